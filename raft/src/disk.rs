//! What log and snapshots ask of a disk, and the host's own.
//!
//! The operations are few and map to one system call each, so that the host's path costs nothing
//! more, and a simulated disk can stop, lose, tear or damage at every one of them.

use std::{
    fmt,
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// A place for files. What is written is durable after [`DiskFile::sync_data`]; a name is durable
/// after [`Disk::sync_dir`] of its directory.
pub trait Disk: Clone + Send + Sync + fmt::Debug + 'static {
    /// An open file.
    type File: DiskFile;
    /// Holds a lock while it lives.
    type Lock: Send + 'static;
    /// Whether operations block, so that work on the disk belongs on threads of its own.
    const BLOCKING: bool;
    /// Size of an ordinary log segment.
    const SEGMENT_BYTES: u64;

    /// Makes a directory with its parents, durably.
    ///
    /// # Errors
    /// What the file system says.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Takes a file's lock; `None` when somebody else has it.
    ///
    /// # Errors
    /// What the file system says.
    fn lock(&self, path: &Path) -> io::Result<Option<Self::Lock>>;

    /// Opens an empty file for reading and writing; what it held is gone.
    ///
    /// # Errors
    /// What the file system says.
    fn create(&self, path: &Path) -> io::Result<Self::File>;

    /// Opens a file that exists for reading and writing.
    ///
    /// # Errors
    /// What the file system says.
    fn open(&self, path: &Path) -> io::Result<Self::File>;

    /// All bytes of a file.
    ///
    /// # Errors
    /// What the file system says; an interrupted machine counts too.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// Length of a file in bytes.
    ///
    /// # Errors
    /// What the file system says.
    fn len(&self, path: &Path) -> io::Result<u64>;

    /// The files of a directory, sorted.
    ///
    /// # Errors
    /// What the file system says.
    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>>;

    /// Gives a file another name in the same directory, replacing what had it.
    ///
    /// # Errors
    /// What the file system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the file system says.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// What the file system says.
    fn sync_dir(&self, directory: &Path) -> io::Result<()>;
}

/// An open file of a [`Disk`].
pub trait DiskFile: Send + Sync + 'static {
    /// Writes all bytes at an offset; the file grows when needed.
    ///
    /// # Errors
    /// What the file system says.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes the file's bytes durable (`fdatasync`).
    ///
    /// # Errors
    /// What the file system says. Nothing is known of the bytes afterwards.
    fn sync_data(&self) -> io::Result<()>;

    /// Makes the file's bytes and metadata durable (`fsync`).
    ///
    /// # Errors
    /// What the file system says. Nothing is known of the bytes afterwards.
    fn sync_all(&self) -> io::Result<()>;
}

/// The host's file systems.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostDisk;

impl Disk for HostDisk {
    type File = File;
    type Lock = File;
    const BLOCKING: bool = true;
    const SEGMENT_BYTES: u64 = 8 << 20;

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            self.create_dir(parent)?;
            match fs::create_dir(path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other?,
            }
            return self.sync_dir(parent);
        }
        fs::create_dir_all(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Option<File>> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)
    }

    fn open(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(path)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn len(&self, path: &Path) -> io::Result<u64> {
        Ok(fs::metadata(path)?.len())
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for item in fs::read_dir(directory)? {
            paths.push(item?.path());
        }
        paths.sort_unstable();
        Ok(paths)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        File::open(directory)?.sync_all()
    }
}

impl DiskFile for File {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }

    fn sync_all(&self) -> io::Result<()> {
        File::sync_all(self)
    }
}

/// Writes a whole file durably under a temporary name, then gives it its own. What was begun is
/// removed again on failure, because on a full disk it would keep the space that others wait for.
pub(crate) fn replace<D: Disk>(
    disk: &D,
    temporary: &Path,
    path: &Path,
    bytes: &[u8],
) -> io::Result<()> {
    let written = disk.create(temporary).and_then(|file| {
        file.write_all_at(bytes, 0)?;
        file.sync_all()
    });
    if let Err(error) = written {
        let _ = disk.remove(temporary);
        return Err(error);
    }
    disk.rename(temporary, path)?;
    disk.sync_dir(path.parent().unwrap_or(Path::new(".")))
}
