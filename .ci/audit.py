"""Known vulnerabilities in what is installed: 1 where there are some; a word and 0 where nobody can be asked.

pip-audit takes a package that its source does not know for one without vulnerabilities: a source without such data would
pass everything. So it is asked first for a release that every database of them must know.
"""

from __future__ import annotations

import json
import subprocess
import sys
from tempfile import NamedTemporaryFile

MUST_BE_KNOWN = "pillow==9.0.0"
AUDIT = (sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--timeout", "20")


def problem() -> str | None:
    """Why the database cannot be asked, if so."""
    if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1", "pip-audit>=2.9"]).returncode:
        return "pip-audit cannot be installed"
    with NamedTemporaryFile("w", suffix=".txt") as asked:
        asked.write(MUST_BE_KNOWN)
        asked.flush()
        command = [*AUDIT, "--format", "json", "--no-deps", "--disable-pip", "-r", asked.name]
        answer = subprocess.run(command, capture_output=True, text=True)
    try:
        (package,) = json.loads(answer.stdout)["dependencies"]
    except ValueError:
        last = (answer.stderr.strip().splitlines() or ["no answer"])[-1]
        return f"the database of vulnerabilities cannot be reached ({last})"
    return None if package.get("vulns") else "what answers for it knows no vulnerabilities"


def main() -> int:
    why = problem()
    if why is not None:
        print(f"audit skipped: {why}")
        return 0
    return subprocess.run([*AUDIT, "--skip-editable"]).returncode


if __name__ == "__main__":
    sys.exit(main())
