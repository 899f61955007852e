"""Puts ``configs/`` and ``experiments/launch/`` into the wheel, beside the code that reads them.

A plain ``force-include`` would also copy them beside an editable install, where a copy goes stale
and leaves a second folder called ``moejax`` in site-packages.
"""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DataHook(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "standard":
            build_data["force_include"]["configs"] = "moejax/_configs"
            build_data["force_include"]["experiments/launch"] = "moejax/_launch"
