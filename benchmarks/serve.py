"""How does a speech server do under load, as its listeners hear it? `declaim bench serve`, from a checkout.

Open loop (Poisson, bursts, a recorded trace) and closed loop, many tenants, HTTP, SSE and WebSocket. First audio is the
first audible sound: leading silence is waited for, headers do not count. Under-runs are those of a player that starts
with 0, 100 or 200 ms in its buffer. --sweep finds the highest rate that holds the objective.

    python benchmarks/serve.py --url http://127.0.0.1:8000/v1 --rate 2 [--sweep] [--report FOLDER]
"""

import typer

from declaim.load.cli import serve

if __name__ == "__main__":
    typer.run(serve)
