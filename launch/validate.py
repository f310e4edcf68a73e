"""Check: ``python launch/validate.py +sequence=... [overrides]`` reads configuration and data, and trains nothing."""

from lifealign.environment import prepare_process

prepare_process()

from lifealign.command import hydra_command  # noqa: E402
from lifealign.validate import validate  # noqa: E402

if __name__ == "__main__":
    hydra_command(validate)
