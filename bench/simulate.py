"""Fleets of many nodes: `python -m bench.simulate [--quick | --plans] [--nodes N] [--plot FILE]`.

The code that decides is the cluster's own; nodes, models and requests are made up.

The time that a plan takes, in several situations (`bench.plans`).

What becomes of requests: the same ones under our routing, without its choice of a replica, and under what load balancers
do (`bench.simulation`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.plans import time_plans
from bench.simulation import comparison


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small fleets only: less than a minute")
    parser.add_argument("--plans", action="store_true", help="only the times of plans")
    parser.add_argument("--nodes", type=int, help="only requests, and only in the fleet of so many nodes")
    parser.add_argument("--plot", type=Path, help="where a picture of the comparison goes, as SVG")
    asked = parser.parse_args()
    if not asked.quick and not asked.nodes:
        time_plans()
    fleets = () if asked.plans else comparison.QUICK if asked.quick else comparison.FULL
    found = {fleet: comparison.compare(fleet) for fleet in fleets if asked.nodes in (None, fleet.nodes)}
    if asked.plot:
        comparison.picture(asked.plot, found)


if __name__ == "__main__":
    main()
