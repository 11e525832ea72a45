"""Settings that all parts share. Each can be given as an environment variable with the prefix ``GENI_VIOLIN_``."""

import hashlib
from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Where things are and how long to wait. Times are in milliseconds."""

    model_config = SettingsConfigDict(env_prefix="GENI_VIOLIN_")

    state_dir: Path = Path("/var/lib/geni-violin")
    """Everything this installation keeps: database, images, logs, sockets, the ledger of its processes."""

    prepare_deadline_ms: int = 10_000
    cut_deadline_ms: int = 5_000
    """A VM whose cut is not confirmed by then is resumed by its agent, and the snapshot aborts."""
    stream_deadline_ms: int = 600_000
    max_frame_lifetime_ms: int = 500
    """How long a frame may be on its way. An old color is retired then, if the counters do not tell it earlier."""
    link_seed: int = 0
    """Decides which frames a link with a loss loses; 0 for others each time (a link's log has the seed it took)."""
    coordinator_port: int = 7670
    """Where the coordinator listens; 0 takes any free port."""
    coordinator_url: str = ""
    """The coordinator that the command line speaks to; empty for the one of this installation."""
    store_url: str = ""
    """Where images are kept: s3://BUCKET or s3://BUCKET/PREFIX; empty for a folder. Credentials are no setting: they
    are in the file that GENI_VIOLIN_S3_CREDENTIALS_FILE names, or in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""
    s3_endpoint: str = ""
    """The object store's address, http://HOST:PORT or https://HOST; empty for AWS."""
    s3_region: str = "us-east-1"
    log_level: str = "info"

    @property
    def installation_id(self) -> str:
        """Four hexadecimal digits that tell this installation's bridges and taps from another's."""
        return hashlib.sha256(str(self.state_dir.resolve()).encode()).hexdigest()[:4]

    @property
    def run_dir(self) -> Path:
        """Sockets, process records and the addresses of the parts."""
        return self.state_dir / "run"

    @property
    def log_dir(self) -> Path:
        """One log file a part."""
        return self.state_dir / "log"
