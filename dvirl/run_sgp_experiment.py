"""One fine-tuning as an experiment: train, evaluate before and after, write `results/<name of run_dir>.json`."""

import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from dvirl import cli, train_sgp
from dvirl.config import SGPConfig
from dvirl.settings import from_namespace, read_yaml
from dvirl.trace import plain, write_json


def main(args: Namespace | SGPConfig) -> Path:
    """Train, and return a file with settings, versions and held-out figures; arguments and errors as in `train_sgp`."""
    config = from_namespace(SGPConfig, args)
    result = train_sgp.main(config)
    content = plain({**read_yaml(Path(config.run_dir) / "config.yaml"), **asdict(result)})
    path = Path("results") / f"{Path(config.run_dir).name}.json"
    write_json(path, content)
    print(f"results: {path}")
    return path


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda argv: main(train_sgp.parse_args(argv)), sys.argv[1:]))
