"""How good generated pictures are: distances from real ones in a frozen network, and copies."""

from moejax.analysis.fidelity.pictures import RealPictures, picture_metrics
