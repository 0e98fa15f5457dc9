//! The directory that a storage process owns, and how anything in it changes: made complete and
//! synced under `staging/`, then renamed to its place, then the place's directory synced. A crash
//! leaves the old or the new; what it leaves under `staging/` is removed at the next start.
//!
//! ```text
//! storage.json              version, cluster id, epoch and the boot that it is of
//! lock                      held while a process runs
//! staging/
//! images/<sha512>/          content, image.json
//! instances/<server id>/    root-<sha512>.img, config.iso
//! volumes/<volume id>/      data, volume.json
//! ```

use crate::control::Error;
use crate::service::StartError;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const VERSION: u32 = 1;
const FSYNC_ROUNDS: usize = 31;

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    version: u32,
    cluster_id: String,
    #[serde(default)]
    epoch: u64,
    #[serde(default)]
    boot_id: String,
}

/// The locked directory.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    epoch: u64,
    serial: AtomicU64,
    /// Released when dropped, or when the process ends however it ends.
    _lock: File,
}

/// Gives a directory that no process uses to another cluster; a second time changes nothing.
///
/// # Errors
/// Where the directory can't be used, or belongs to neither.
pub fn hand_to_cluster(path: &Path, from: &str, to: &str) -> Result<(), StartError> {
    match Directory::open(path, to) {
        Err(StartError::ForeignCluster { found, .. }) if found == from => {
            let directory = Directory::open(path, from)?;
            let stamp = directory.path.join("storage.json");
            let failed = |source| StartError::Directory { path: stamp.clone(), source };
            let bytes = fs::read(&stamp).map_err(failed)?;
            let old: Stamp = serde_json::from_slice(&bytes).map_err(|e| failed(e.into()))?;
            directory.write_stamp(&Stamp { cluster_id: to.to_owned(), ..old })
        }
        result => result.map(drop),
    }
}

impl Directory {
    /// Makes the directory where it is missing, locks it and clears what a crash left.
    pub(crate) fn open(path: &Path, cluster_id: &str) -> Result<Self, StartError> {
        let failed = |source| StartError::Directory { path: path.to_owned(), source };
        make(path).map_err(failed)?;
        let lock = create(&path.join("lock")).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(StartError::DirectoryTaken { path: path.to_owned() });
            }
            Err(error) => return Err(failed(error.into())),
        }
        let staging = path.join("staging");
        if staging.exists() {
            fs::remove_dir_all(&staging).map_err(failed)?;
        }
        for name in ["staging", "images", "instances", "volumes"] {
            make(&path.join(name)).map_err(failed)?;
        }
        let (path_of_its_own, serial) = (path.to_owned(), AtomicU64::new(0));
        let mut directory = Self { path: path_of_its_own, epoch: 0, serial, _lock: lock };
        directory.epoch = directory.stamp(cluster_id)?;
        sync(path).map_err(failed)?;
        Ok(directory)
    }

    /// Checks whose directory it is; the epoch, which is raised durably in each boot of the kernel.
    fn stamp(&self, cluster_id: &str) -> Result<u64, StartError> {
        let path = self.stamp_path();
        let failed = |source| StartError::Directory { path: path.clone(), source };
        let boot_id = boot_id().map_err(failed)?;
        let found: Option<Stamp> = match fs::read(&path) {
            Ok(bytes) => {
                Some(serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))?)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        let epoch = match &found {
            Some(stamp) if stamp.version != VERSION => {
                return Err(StartError::Version { path, version: stamp.version });
            }
            Some(stamp) if stamp.cluster_id != cluster_id => {
                return Err(StartError::ForeignCluster { path, found: stamp.cluster_id.clone() });
            }
            Some(stamp) if stamp.boot_id == boot_id => stamp.epoch,
            Some(stamp) => stamp.epoch + 1,
            None => 1,
        };
        let cluster_id = cluster_id.to_owned();
        let stamp = Stamp { version: VERSION, cluster_id, epoch, boot_id };
        if found.as_ref() != Some(&stamp) {
            self.write_stamp(&stamp)?;
        }
        Ok(epoch)
    }

    fn write_stamp(&self, stamp: &Stamp) -> Result<(), StartError> {
        let path = self.stamp_path();
        serde_json::to_vec_pretty(stamp)
            .map_err(io::Error::from)
            .and_then(|bytes| self.write(&path, &bytes))
            .map_err(|source| StartError::Directory { path, source })
    }

    fn stamp_path(&self) -> PathBuf {
        self.path.join("storage.json")
    }

    /// Differs from that of every other boot of the kernel over this directory: what the page cache
    /// held of its files in another epoch may be lost.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.path.join("images")
    }

    pub(crate) fn instances(&self) -> PathBuf {
        self.path.join("instances")
    }

    pub(crate) fn volumes(&self) -> PathBuf {
        self.path.join("volumes")
    }

    /// A name under `staging/` that nothing else has.
    pub(crate) fn staging(&self, what: &str) -> Staging {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        Staging { path: self.path.join("staging").join(format!("{what}-{serial}")) }
    }

    /// Replaces the file at `path` by `bytes`, durably.
    pub(crate) fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let staging = self.staging("file");
        let mut file = create_new(staging.path())?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(staging.path(), path)?;
        sync_parent(path)
    }

    /// Takes what is at `path` away, durably, then removes it; whether there was anything.
    pub(crate) fn remove(&self, path: &Path) -> Result<bool, Error> {
        let failed = |error| Error::io(format_args!("remove {}", path.display()), error);
        let staging = self.staging("removed");
        match fs::rename(path, staging.path()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(failed(error)),
        }
        sync_parent(path).map_err(failed)?;
        Ok(true)
    }

    /// Total and available bytes of the file system.
    pub(crate) fn space(&self) -> Result<(u64, u64), Error> {
        let space = rustix::fs::statvfs(&self.path)
            .map_err(|error| Error::io(format_args!("measure {}", self.path.display()), error))?;
        let bytes = |blocks: u64| blocks.saturating_mul(space.f_frsize);
        Ok((bytes(space.f_blocks), bytes(space.f_bavail)))
    }

    /// Median time of overwriting 512 bytes and fdatasync, microseconds.
    pub(crate) fn measure_fdatasync(&self) -> io::Result<u64> {
        let staging = self.staging("fdatasync");
        let file = create_new(staging.path())?;
        file.write_all_at(&[1; 4096], 0)?;
        file.sync_all()?;
        let mut rounds = Vec::with_capacity(FSYNC_ROUNDS);
        for round in 0..FSYNC_ROUNDS {
            let start = Instant::now();
            file.write_all_at(&[round as u8; 512], 0)?;
            file.sync_data()?;
            rounds.push(start.elapsed());
        }
        rounds.sort_unstable();
        Ok(rounds[FSYNC_ROUNDS / 2].as_micros() as u64)
    }
}

/// The id of the kernel's boot.
fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Something half made: removed when dropped, unless it was renamed to its place.
#[derive(Debug)]
pub(crate) struct Staging {
    path: PathBuf,
}

impl Staging {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let removed = match fs::symlink_metadata(&self.path) {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&self.path),
            Ok(_) => fs::remove_file(&self.path),
            Err(_) => return,
        };
        if let Err(error) = removed {
            tracing::warn!(path = %self.path.display(), %error, "left for the next start to remove");
        }
    }
}

/// Makes a directory for nobody else's eyes; one that is there is no error.
pub(crate) fn make(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Creates a file that must not exist, read-write, mode 0600.
pub(crate) fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Makes a directory's entries durable.
pub(crate) fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes the entry of `path` in its directory durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    sync(path.parent().unwrap_or(Path::new("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_process_is_told_that_the_directory_is_taken() {
        let place = tempfile::tempdir().unwrap();
        let first = Directory::open(place.path(), "c1").unwrap();
        let error = Directory::open(place.path(), "c1").unwrap_err();
        assert!(matches!(error, StartError::DirectoryTaken { .. }), "{error}");
        drop(first);
        Directory::open(place.path(), "c1").unwrap();
    }

    #[test]
    fn another_clusters_directory_is_refused() {
        let place = tempfile::tempdir().unwrap();
        drop(Directory::open(place.path(), "c1").unwrap());
        let error = Directory::open(place.path(), "c2").unwrap_err();
        assert!(matches!(error, StartError::ForeignCluster { .. }), "{error}");
    }

    #[test]
    fn the_epoch_is_another_one_in_another_boot_and_only_then() {
        let place = tempfile::tempdir().unwrap();
        let epoch = || Directory::open(place.path(), "c1").unwrap().epoch();
        assert_eq!((epoch(), epoch()), (1, 1));
        let stamp = place.path().join("storage.json");
        let text = fs::read_to_string(&stamp).unwrap();
        fs::write(&stamp, text.replace(&boot_id().unwrap(), "another")).unwrap();
        assert_eq!((epoch(), epoch()), (2, 2));
        // As an earlier version left it: whatever boot that was.
        fs::write(&stamp, r#"{"version": 1, "cluster_id": "c1"}"#).unwrap();
        assert_eq!(epoch(), 1);
        hand_to_cluster(place.path(), "c1", "c2").unwrap();
        assert_eq!(Directory::open(place.path(), "c2").unwrap().epoch(), 1);
    }

    #[test]
    fn what_a_crash_left_half_made_is_gone_after_the_next_start() {
        let place = tempfile::tempdir().unwrap();
        drop(Directory::open(place.path(), "c1").unwrap());
        make(&place.path().join("staging/volume-3")).unwrap();
        fs::write(place.path().join("staging/volume-3/data"), "half").unwrap();
        let directory = Directory::open(place.path(), "c1").unwrap();
        assert_eq!(fs::read_dir(directory.path().join("staging")).unwrap().count(), 0);
    }
}
