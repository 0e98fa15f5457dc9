//! The images that this host holds, each by the SHA-512 of its content.

use crate::control::{Error, ImageInfo, check_id, check_sha512};
use crate::directory::{self, Directory};
use crate::image::{self, Arrived, Intake};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most images on one host.
pub(crate) const IMAGES_MAX: usize = 10_000;
/// How long an import waits for the next byte, in poll slices of a second.
const IMPORT_IDLE_SECONDS_MAX: u32 = 120;
const IMPORT_CHUNK_BYTES: usize = 1 << 20;
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    #[serde(flatten)]
    info: ImageInfo,
}

/// What is imported, and from where.
pub(crate) struct Import {
    pub(crate) image_id: String,
    pub(crate) disk_format: String,
    pub(crate) size_limit_bytes: u64,
    pub(crate) content: OwnedFd,
}

/// The images of one host.
#[derive(Debug)]
pub(crate) struct Images {
    directory: Arc<Directory>,
    held: Mutex<BTreeMap<String, ImageInfo>>,
}

impl Images {
    /// Reads what is held. An entry that makes no sense is left alone and not served.
    pub(crate) fn open(directory: Arc<Directory>) -> io::Result<Self> {
        let mut held = BTreeMap::new();
        for entry in fs::read_dir(directory.images())? {
            let path = entry?.path();
            match read_record(&path.join("image.json")) {
                Ok(info) if path.file_name() == Some(info.sha512.as_ref()) => {
                    held.insert(info.sha512.clone(), info);
                }
                Ok(info) => {
                    tracing::error!(path = %path.display(), sha512 = info.sha512, "image not served: its record names another");
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "image not served: unreadable record");
                }
            }
        }
        Ok(Self { directory, held: Mutex::new(held) })
    }

    /// What is held, by hash.
    pub(crate) fn list(&self) -> Vec<ImageInfo> {
        self.held().values().cloned().collect()
    }

    /// One image.
    pub(crate) fn get(&self, sha512: &str) -> Option<ImageInfo> {
        self.held().get(sha512).cloned()
    }

    /// Opens an image's content to read.
    pub(crate) fn read(&self, sha512: &str) -> Result<(File, ImageInfo), Error> {
        check_sha512(sha512)?;
        let missing = || Error::not_found(format!("image with SHA-512 {sha512} is not held here"));
        let info = self.get(sha512).ok_or_else(missing)?;
        let path = self.path(sha512).join("content");
        let file = File::open(&path)
            .map_err(|error| Error::io(format_args!("open {}", path.display()), error))?;
        Ok((file, info))
    }

    /// Stores what comes from a descriptor; `stop` ends it early.
    pub(crate) fn import(&self, import: Import, stop: &AtomicBool) -> Result<ImageInfo, Error> {
        check_id("image", &import.image_id)?;
        image::check_format(&import.disk_format)?;
        let mut intake = self.intake(import.size_limit_bytes)?;
        let mut content = File::from(import.content);
        let mut chunk = vec![0; IMPORT_CHUNK_BYTES];
        loop {
            let read = read_some(&mut content, &mut chunk, stop).map_err(|error| {
                Error::io(format_args!("read the content of image {}", import.image_id), error)
            })?;
            if read == 0 {
                break;
            }
            intake.write(&chunk[..read])?;
        }
        self.keep(intake.finish()?)
    }

    /// Starts taking an image in.
    pub(crate) fn intake(&self, size_limit_bytes: u64) -> Result<Intake, Error> {
        if self.held().len() >= IMAGES_MAX {
            return Err(Error::invalid(format!("this host holds {IMAGES_MAX} images, its limit")));
        }
        Intake::new(self.directory.staging("image"), size_limit_bytes)
    }

    /// Puts an image that has arrived in its place.
    pub(crate) fn keep(&self, arrived: Arrived) -> Result<ImageInfo, Error> {
        let failed = |error| Error::io("keep an image", error);
        let Arrived { staging, info } = arrived;
        let record = serde_json::to_vec_pretty(&Record { version: VERSION, info: info.clone() })
            .map_err(|error| failed(error.into()))?;
        let mut file = directory::create_new(&staging.path().join("image.json")).map_err(failed)?;
        file.write_all(&record).and_then(|()| file.sync_all()).map_err(failed)?;
        directory::sync(staging.path()).map_err(failed)?;

        let mut held = self.held();
        if held.contains_key(&info.sha512) {
            return Ok(info);
        }
        let place = self.path(&info.sha512);
        // An unreadable entry of that name is replaced: what just arrived is verified.
        self.directory.remove(&place)?;
        fs::rename(staging.path(), &place).map_err(failed)?;
        directory::sync_parent(&place).map_err(failed)?;
        held.insert(info.sha512.clone(), info.clone());
        Ok(info)
    }

    /// Removes an image; who has it open keeps reading it.
    pub(crate) fn delete(&self, sha512: &str) -> Result<(), Error> {
        check_sha512(sha512)?;
        let mut held = self.held();
        self.directory.remove(&self.path(sha512))?;
        held.remove(sha512);
        Ok(())
    }

    fn path(&self, sha512: &str) -> PathBuf {
        self.directory.images().join(sha512)
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<String, ImageInfo>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read_record(path: &std::path::Path) -> io::Result<ImageInfo> {
    let record: Record = serde_json::from_slice(&fs::read(path)?)?;
    if record.version != VERSION {
        let message = format!("version {}; this program reads {VERSION}", record.version);
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(record.info)
}

/// Reads from a descriptor of any kind, blocking or not, giving up when its writer falls silent.
fn read_some(content: &mut File, chunk: &mut [u8], stop: &AtomicBool) -> io::Result<usize> {
    for _ in 0..IMPORT_IDLE_SECONDS_MAX {
        if stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("the storage process is stopping"));
        }
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        match poll(&mut [PollFd::new(content, PollFlags::IN)], Some(&second)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        match content.read(chunk) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            result => return result,
        }
    }
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        format!("nothing came for {IMPORT_IDLE_SECONDS_MAX} seconds"),
    ))
}
