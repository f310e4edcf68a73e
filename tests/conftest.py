"""Loaded by pytest before any test: the settings that must stand before torch is imported."""

from lifealign.environment import prepare_process

prepare_process()
