"""Checkpoint surgery: trees in, trees and a report out."""
