"""Shows results in the browser while they grow, or writes them as one HTML file. Changes nothing.

Live, until Ctrl-C:   python jobs/dashboard.py runs
One file to keep:     python jobs/dashboard.py runs/furniture --report report.html
On a cluster's head:  the same, and on your machine `ssh -L 8050:127.0.0.1:8050 HEAD`

RESULTS is a folder of runs, a run or a sweep: a path, or an address such as s3://bucket/runs. Ray
need not be running.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from crossmost_ray.command_line import run_job
from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", help="folder of runs, a run, or a sweep")
    parser.add_argument("--report", metavar="FILE", help="write one HTML file, and end")
    parser.add_argument("--port", type=port_number, default=8050, help="0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    args = parser.parse_args()

    def show() -> str:
        root = Store(args.results, key="RESULTS")
        if not root.is_folder():
            raise ConfigError(
                f"there is no folder {root}; give the folder that holds your runs, such as `runs`: "
                "the key `output` of their configs says which it is"
            )
        try:
            if args.report is not None:
                from crossmost_ray.dashboard.report import write_report
                from crossmost_ray.dashboard.runs import load_results

                path = Path(args.report).expanduser()
                write_report(load_results(root), path, title=Path(root.root).name)
                return f"the report is at {path}"
            from crossmost_ray.dashboard.app import serve
        except ModuleNotFoundError as missing:
            # Of our own modules none is missing.
            raise ConfigError(
                f"the dashboard needs {missing.name}: pip install 'crossmost_ray[dashboard]'"
            ) from None
        serve(root, host=args.host, port=args.port)
        return "the page is closed; the results are as they were"

    run_job(show)


def port_number(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError
    return port


if __name__ == "__main__":
    main()
