"""Puts ``configs/`` into the wheel as ``moejax/_configs``.

A plain ``force-include`` would also copy it beside an editable install, where the copy goes stale
and leaves a second folder called ``moejax`` in site-packages.
"""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConfigsHook(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "standard":
            build_data["force_include"]["configs"] = "moejax/_configs"
