//! What another host has opened: an image or a volume as a file with a size, and the requests
//! executed on it.

use super::wire::{Command, ExportInfo, Request, RequestError, command_flag};
use crate::control::{Error, check_sha512};
use crate::images::Images;
use crate::volumes::{ExportName, SessionGuard, Volumes};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const ZEROES_BYTES: usize = 1 << 20;

/// What can be opened.
#[derive(Clone, Debug)]
pub(crate) struct Exports {
    pub(crate) images: Arc<Images>,
    pub(crate) volumes: Arc<Volumes>,
    /// [`crate::directory::Directory::epoch`].
    pub(crate) epoch: u64,
}

/// What is open.
#[derive(Debug)]
pub(crate) struct Export {
    file: File,
    size_bytes: u64,
    read_only: bool,
}

impl Exports {
    /// What `name` is, without opening it.
    pub(crate) fn look_up(&self, name: &str) -> Result<ExportInfo, Error> {
        if let Some(sha512) = name.strip_prefix("image/") {
            check_sha512(sha512)?;
            let image = self.images.get(sha512).ok_or_else(|| unknown(name))?;
            return Ok(ExportInfo::new(image.size_bytes, true));
        }
        let name = ExportName::parse(name).ok_or_else(|| unknown(name))?;
        let (size_bytes, read_only) = self.volumes.look_up(&name)?;
        Ok(ExportInfo::new(size_bytes, read_only))
    }

    /// Opens `name` for `host`; for a volume with the guard that its gate waits for.
    pub(crate) fn open(
        &self,
        name: &str,
        host: &str,
    ) -> Result<(Export, Option<SessionGuard>), Error> {
        if let Some(sha512) = name.strip_prefix("image/") {
            let (file, image) = self.images.read(sha512)?;
            return Ok((Export { file, size_bytes: image.size_bytes, read_only: true }, None));
        }
        let name = ExportName::parse(name).ok_or_else(|| unknown(name))?;
        let open = self.volumes.connect(&name, host)?;
        let export =
            Export { file: open.file, size_bytes: open.size_bytes, read_only: open.read_only };
        Ok((export, Some(open.guard)))
    }

    /// Names that `LIST` tells: the images. Volumes are opened only by who was given their name.
    pub(crate) fn names(&self) -> Vec<String> {
        self.images.list().into_iter().map(|image| format!("image/{}", image.sha512)).collect()
    }
}

fn unknown(name: &str) -> Error {
    Error::not_found(format!("there is no export {name:?}"))
}

impl Export {
    pub(crate) fn info(&self) -> ExportInfo {
        ExportInfo::new(self.size_bytes, self.read_only)
    }

    /// Executes one request and gives the bytes that were read, after `prefix_bytes` of room.
    pub(crate) fn execute(
        &self,
        request: &Request,
        payload: &[u8],
        prefix_bytes: usize,
    ) -> Result<Vec<u8>, RequestError> {
        let command = request.check(self.size_bytes, self.read_only)?;
        let length = request.length as usize;
        let mut reply = vec![0; prefix_bytes];
        let done = match command {
            Command::Read => {
                reply.resize(prefix_bytes + length, 0);
                self.file.read_exact_at(&mut reply[prefix_bytes..], request.offset)
            }
            Command::Write => self.file.write_all_at(payload, request.offset),
            Command::Trim => self.trim(request.offset, request.length),
            Command::WriteZeroes => {
                let holes = request.flags & command_flag::NO_HOLE == 0;
                self.write_zeroes(request.offset, request.length, holes)
            }
            Command::Flush => self.file.sync_data(),
            Command::Disconnect => Ok(()),
        };
        let writes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
        let done = match done {
            Ok(()) if writes && request.flags & command_flag::FUA != 0 => self.file.sync_data(),
            done => done,
        };
        match done {
            Ok(()) => Ok(reply),
            Err(error) => {
                tracing::warn!(?command, offset = request.offset, length, %error, "export request failed");
                Err(match error.kind() {
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                        RequestError::NoSpace
                    }
                    _ => RequestError::Io,
                })
            }
        }
    }

    /// A hint: a file system that can't is no error.
    fn trim(&self, offset: u64, length: u32) -> io::Result<()> {
        match self.fallocate(FallocateFlags::PUNCH_HOLE, offset, length) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            result => Ok(result?),
        }
    }

    fn write_zeroes(&self, offset: u64, length: u32, holes: bool) -> io::Result<()> {
        let how = if holes { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.fallocate(how, offset, length) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            result => return Ok(result?),
        }
        let zeroes = vec![0; ZEROES_BYTES];
        let end = offset + u64::from(length);
        let mut at = offset;
        while at < end {
            let wanted = (end - at).min(ZEROES_BYTES as u64) as usize;
            self.file.write_all_at(&zeroes[..wanted], at)?;
            at += wanted as u64;
        }
        Ok(())
    }

    fn fallocate(&self, how: FallocateFlags, offset: u64, length: u32) -> rustix::io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, u64::from(length))
    }
}
