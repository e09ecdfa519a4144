"""Source: ``tensorrt_llm/plugin/__init__.py``."""

from tensorrt_llm.plugin.plugin import PluginConfig, add_plugin_argument

__all__ = ["PluginConfig", "add_plugin_argument"]
