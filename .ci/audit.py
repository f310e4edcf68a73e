"""Known vulnerabilities in what is installed: 1 where there are some; a word and 0 where nobody can be asked.

pip-audit takes a package that its source does not know for one without vulnerabilities: a mirror without such data would
pass everything. So it is asked first for one that it must know.
"""

from __future__ import annotations

import json
import subprocess
import sys
from urllib.error import URLError
from urllib.request import urlopen

MUST_BE_KNOWN = "https://pypi.org/pypi/pillow/9.0.0/json"
SECONDS = 20


def problem() -> str | None:
    """Why the database cannot be asked, if so."""
    try:
        with urlopen(MUST_BE_KNOWN, timeout=SECONDS) as answer:
            known = json.load(answer).get("vulnerabilities")
    except (URLError, OSError, ValueError) as error:
        return f"the database of vulnerabilities cannot be reached ({error})"
    return None if known else "what answers for it knows no vulnerabilities"


def main() -> int:
    why = problem()
    if why is None and subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "pip-audit>=2.9"]).returncode:
        why = "pip-audit cannot be installed"
    if why is not None:
        print(f"audit skipped: {why}")
        return 0
    return subprocess.run([sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner", "off"]).returncode


if __name__ == "__main__":
    sys.exit(main())
