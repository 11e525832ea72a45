"""Running other people's programs (``ip``, ``ovs-vsctl``) without a shell and without blocking the event loop."""

import asyncio
import contextlib

from geni_violin.core.errors import MachineFault


async def run_tool(*arguments: str, timeout_s: float = 10.0) -> str:
    """Run a program and give what it printed.

    :raise MachineFault: it is not installed, failed (with its own words), or did not end in time.
    """
    program = arguments[0]
    try:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise MachineFault(f"cannot run {program}: {error.strerror}", "see geni-violin doctor") from error
    try:
        output, errors = await asyncio.wait_for(process.communicate(), timeout_s)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise MachineFault(f"{' '.join(arguments)} did not end within {timeout_s:g} s") from error
        raise
    if process.returncode != 0:
        raise MachineFault(f"{program} refused: {_last_line(errors).removeprefix(f'{program}: ')}")
    return output.decode()


def _last_line(text: bytes) -> str:
    lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"
