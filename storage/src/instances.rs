//! The disks that servers on this host own: their root disks, made from images, and their config
//! drives. They go when the server goes.

use crate::config_drive;
use crate::control::{Error, ErrorKind, check_id, check_sha512, check_size};
use crate::directory::{self, Directory};
use crate::images::Images;
use base64::Engine as _;
use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const COPY_BYTES: usize = 1 << 20;

/// The disks of the servers on this host.
#[derive(Debug)]
pub(crate) struct Instances {
    directory: Arc<Directory>,
    images: Arc<Images>,
    /// Held while an instance's directory changes shape, not while bytes are copied.
    placing: Mutex<()>,
}

impl Instances {
    pub(crate) fn new(directory: Arc<Directory>, images: Arc<Images>) -> Self {
        Self { directory, images, placing: Mutex::new(()) }
    }

    /// The servers that have something here.
    pub(crate) fn list(&self) -> Result<Vec<String>, Error> {
        let folder = self.directory.instances();
        let failed = |error| Error::io(format_args!("list {}", folder.display()), error);
        let entries = fs::read_dir(&folder).map_err(failed)?;
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect::<io::Result<_>>().map_err(failed)
    }

    /// Makes a server's disk from an image.
    pub(crate) fn create_root(
        &self,
        server_id: &str,
        sha512: &str,
        size_bytes: u64,
    ) -> Result<(), Error> {
        check_id("server", server_id)?;
        check_sha512(sha512)?;
        check_size("disk", size_bytes)?;
        if self.has_root(server_id, sha512, size_bytes)? {
            return Ok(());
        }
        let (source, image) = self.images.read(sha512)?;
        if size_bytes < image.size_bytes {
            return Err(Error::invalid(format!(
                "disk of {size_bytes} bytes for server {server_id}: its image has {} bytes",
                image.size_bytes
            )));
        }
        let failed = |error| Error::io(format_args!("make the disk of server {server_id}"), error);
        let folder = self.path(server_id);
        let staging = self.directory.staging("root");
        let made = (|| {
            // Before the disk: what syncs the disk then has little left to do for the folder.
            directory::make(&folder)?;
            let disk = directory::create_new(staging.path())?;
            copy(&source, &disk, image.size_bytes)?;
            disk.set_len(size_bytes)?;
            disk.sync_all()?;
            directory::sync_parent(&folder)
        })();
        if let Err(error) = made {
            // Fails where there is something in it, which is right.
            let _ = fs::remove_dir(&folder);
            return Err(failed(error));
        }
        let _placing = self.placing();
        if self.has_root(server_id, sha512, size_bytes)? {
            return Ok(());
        }
        fs::rename(staging.path(), folder.join(format!("root-{sha512}.img"))).map_err(failed)?;
        directory::sync(&folder).map_err(failed)
    }

    /// Opens a server's disk to read and write.
    pub(crate) fn open_root(&self, server_id: &str) -> Result<(File, u64), Error> {
        check_id("server", server_id)?;
        let missing = || Error::not_found(format!("server {server_id} has no disk here"));
        let path = self.root(server_id)?.ok_or_else(missing)?;
        let failed = |error| Error::io(format_args!("open {}", path.display()), error);
        let disk = OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?;
        let size_bytes = disk.metadata().map_err(failed)?.len();
        Ok((disk, size_bytes))
    }

    /// Removes all that a server has here.
    pub(crate) fn delete(&self, server_id: &str) -> Result<(), Error> {
        check_id("server", server_id)?;
        let _placing = self.placing();
        self.directory.remove(&self.path(server_id))?;
        Ok(())
    }

    /// Writes a server's config drive and opens it to read. Nothing is synced: a crash of the host
    /// ends the guest, and its next start writes the drive anew.
    pub(crate) fn write_config_drive(
        &self,
        server_id: &str,
        files: BTreeMap<String, String>,
    ) -> Result<(File, u64), Error> {
        check_id("server", server_id)?;
        let files = files
            .into_iter()
            .map(|(path, body)| {
                let body = decode(&path, &body)?;
                Ok((path, body))
            })
            .collect::<Result<BTreeMap<_, _>, Error>>()?;
        let image = config_drive::image(files)?;
        let failed =
            |error| Error::io(format_args!("write the config drive of server {server_id}"), error);
        let staging = self.directory.staging("config");
        let file = directory::create_new(staging.path()).map_err(failed)?;
        file.write_all_at(&image, 0).map_err(failed)?;
        let _placing = self.placing();
        let folder = self.path(server_id);
        directory::make(&folder).map_err(failed)?;
        fs::rename(staging.path(), folder.join("config.iso")).map_err(failed)?;
        let file = File::open(folder.join("config.iso")).map_err(failed)?;
        Ok((file, image.len() as u64))
    }

    fn placing(&self) -> MutexGuard<'_, ()> {
        self.placing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether that very disk is there; another one is an error.
    fn has_root(&self, server_id: &str, sha512: &str, size_bytes: u64) -> Result<bool, Error> {
        let Some(path) = self.root(server_id)? else {
            return Ok(false);
        };
        let failed = |error| Error::io(format_args!("look at {}", path.display()), error);
        let found_bytes = fs::metadata(&path).map_err(failed)?.len();
        let name = format!("root-{sha512}.img");
        if path.file_name() == Some(name.as_ref()) && found_bytes == size_bytes {
            return Ok(true);
        }
        Err(Error::new(
            ErrorKind::Exists,
            format!(
                "server {server_id} has a disk of {found_bytes} bytes from another image or of \
                 another size"
            ),
        ))
    }

    fn root(&self, server_id: &str) -> Result<Option<PathBuf>, Error> {
        let folder = self.path(server_id);
        let failed = |error| Error::io(format_args!("look at {}", folder.display()), error);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_str().is_some_and(|name| name.starts_with("root-")) {
                return Ok(Some(entry.path()));
            }
        }
        Ok(None)
    }

    fn path(&self, server_id: &str) -> PathBuf {
        self.directory.instances().join(server_id)
    }
}

fn decode(path: &str, body: &str) -> Result<Vec<u8>, Error> {
    base64::engine::general_purpose::STANDARD
        .decode(body)
        .map_err(|error| Error::invalid(format!("config drive file {path:?}: {error}")))
}

/// Copies `length` bytes: by sharing blocks where the file system can, else without the holes.
fn copy(source: &File, target: &File, length: u64) -> io::Result<()> {
    match ioctl_ficlone(target, source) {
        Ok(()) => return Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::XDEV | Errno::NOSYS) => {}
        Err(error) => return Err(error.into()),
    }
    let mut end = 0;
    while end < length {
        let start = match seek(source, SeekFrom::Data(end)) {
            Ok(start) => start.min(length),
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        end = seek(source, SeekFrom::Hole(start))?.min(length);
        copy_range(source, target, start, end)?;
    }
    Ok(())
}

fn copy_range(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut from, mut to) = (start, start);
    while from < end {
        let wanted = usize::try_from(end - from).unwrap_or(usize::MAX).min(1 << 30);
        match copy_file_range(source, Some(&mut from), target, Some(&mut to), wanted) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return copy_by_hand(source, target, from, end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let mut chunk = vec![0; COPY_BYTES];
    let mut offset = start;
    while offset < end {
        let wanted = (end - offset).min(COPY_BYTES as u64) as usize;
        source.read_exact_at(&mut chunk[..wanted], offset)?;
        target.write_all_at(&chunk[..wanted], offset)?;
        offset += wanted as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_keeps_content_and_holes() {
        let place = tempfile::tempdir().unwrap();
        let source = directory::create_new(&place.path().join("source")).unwrap();
        let target = directory::create_new(&place.path().join("target")).unwrap();
        source.set_len(64 << 20).unwrap();
        source.write_all_at(b"middle", (32 << 20) + 5).unwrap();
        copy(&source, &target, 64 << 20).unwrap();
        target.set_len(64 << 20).unwrap();
        let mut found = [0; 6];
        target.read_exact_at(&mut found, (32 << 20) + 5).unwrap();
        assert_eq!(&found, b"middle");
        assert!(target.metadata().unwrap().blocks() * 512 < 1 << 20);
    }
}
