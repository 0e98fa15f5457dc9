//! A host's wall clock that jumps, by Debian's libfaketime: it is loaded ahead of the C library, reads
//! an offset from a file, and leaves monotonic clocks alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

const LIBRARIES: [&str; 2] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib64/faketime/libfaketimeMT.so.1",
];

/// Whether clocks can be made to jump here.
pub(super) fn library() -> Option<&'static Path> {
    LIBRARIES.iter().map(Path::new).find(|path| path.exists())
}

/// The wall clock of one host.
pub(super) struct Clock {
    offset: PathBuf,
}

impl Clock {
    /// A right one, whose file lies in `directory`.
    pub(super) fn new(directory: &Path) -> Result<Clock> {
        let clock = Clock { offset: directory.join("clock-offset") };
        clock.set(0)?;
        Ok(clock)
    }

    /// Sets how far the clock is ahead of the right time; processes follow within a second.
    pub(super) fn set(&self, seconds: i64) -> Result<()> {
        let partial = self.offset.with_extension("partial");
        fs::write(&partial, format!("{seconds:+}\n"))?;
        Ok(fs::rename(partial, &self.offset)?)
    }

    /// Puts a command, and what it starts, under this clock.
    pub(super) fn set_environment(&self, command: &mut Command) {
        let Some(library) = library() else { return };
        command
            .env("LD_PRELOAD", library)
            .env("FAKETIME_TIMESTAMP_FILE", &self.offset)
            .env("FAKETIME_CACHE_DURATION", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .env("DONT_FAKE_MONOTONIC", "1")
            .env("NO_FAKE_STAT", "1");
    }
}
