"""Train: ``deepspeed launch/train.py +sequence=six_domains [overrides]``, or under ``torchrun`` or plain ``python``."""

from lifealign.environment import prepare_process

prepare_process()

from lifealign.command import hydra_command  # noqa: E402
from lifealign.run import train  # noqa: E402

if __name__ == "__main__":
    hydra_command(train)
