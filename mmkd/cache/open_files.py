"""The limit of open files of this process."""

import sys

from mmkd.errors import UserError


def allow_open_files(count: int) -> None:
    """Raises the limit of open files: every shard stays open, and systems allow a process some 1,024 by default."""
    if sys.platform == "win32":
        # Windows has no such limit.
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or count + 500 <= soft:
        return
    if hard != resource.RLIM_INFINITY and count + 500 > hard:
        raise UserError(
            f"The cache has {count} shards, but a process may open {hard} files here. Raise the limit (ulimit "
            "-Hn), or build with a larger cache_shard_rows."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 500, hard))
