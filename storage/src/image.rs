//! What the bytes of an image are, and taking them in: hashed and written as they arrive, in
//! constant memory.

use crate::control::{Error, ErrorKind, ImageInfo, ImageKind};
use crate::directory::{self, Staging};
use md5::Md5;
use sha2::{Digest, Sha256, Sha512};
use std::fs::File;
use std::io::{self, Write};

/// Bytes of an image that are looked at to tell what it is.
const HEAD_BYTES: usize = 1024;
/// Offset and value of the Linux boot protocol's magic.
const BZIMAGE_MAGIC: (usize, &[u8]) = (0x202, b"HdrS");
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// `disk_format`s whose content is stored as it is.
const STORED_AS_IS: [&str; 5] = ["raw", "aki", "ari", "ami", "iso"];

/// Formats that describe a disk rather than being one. Stored as raw they would be handed to a
/// guest as its disk, and any reader that probes would follow what they refer to.
const CONTAINERS: [(&[u8], &str); 6] = [
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk descriptor"),
    (b"conectix", "vhd"),
    (b"vhdxfile", "vhdx"),
    (b"QED\0", "qed"),
];

/// Refuses a `disk_format` that can't be stored.
pub(crate) fn check_format(disk_format: &str) -> Result<(), Error> {
    if STORED_AS_IS.contains(&disk_format) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "disk_format {disk_format:?} can't be imported: convert the image to raw \
         (one of {} is stored as it is)",
        STORED_AS_IS.join(", ")
    )))
}

fn kind(head: &[u8]) -> ImageKind {
    let (offset, magic) = BZIMAGE_MAGIC;
    if head.starts_with(ELF_MAGIC) {
        ImageKind::Elf
    } else if head.get(offset..offset + magic.len()) == Some(magic) {
        ImageKind::Bzimage
    } else {
        ImageKind::Disk
    }
}

fn check_content(head: &[u8]) -> Result<(), Error> {
    match CONTAINERS.iter().find(|(magic, _)| head.starts_with(magic)) {
        None => Ok(()),
        Some((_, name)) => Err(Error::invalid(format!(
            "the content is a {name} image, not the raw content that disk_format promises"
        ))),
    }
}

/// An image on its way in.
pub(crate) struct Intake {
    file: File,
    staging: Staging,
    head: Vec<u8>,
    size_bytes: u64,
    size_limit_bytes: u64,
    md5: Md5,
    sha256: Sha256,
    sha512: Sha512,
}

/// An image that has arrived: its directory is complete and synced, but not yet in its place.
pub(crate) struct Arrived {
    /// The directory to rename.
    pub(crate) staging: Staging,
    /// What it holds.
    pub(crate) info: ImageInfo,
}

impl Intake {
    /// Starts in a directory of its own under `staging`.
    pub(crate) fn new(staging: Staging, size_limit_bytes: u64) -> Result<Self, Error> {
        directory::make(staging.path()).map_err(failed)?;
        let file = directory::create_new(&staging.path().join("content")).map_err(failed)?;
        Ok(Self {
            file,
            staging,
            head: Vec::with_capacity(HEAD_BYTES),
            size_bytes: 0,
            size_limit_bytes,
            md5: Md5::new(),
            sha256: Sha256::new(),
            sha512: Sha512::new(),
        })
    }

    /// Takes the next bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.size_bytes = self.size_bytes.saturating_add(bytes.len() as u64);
        if self.size_bytes > self.size_limit_bytes {
            return Err(Error::invalid(format!(
                "the image has more than the {} bytes allowed",
                self.size_limit_bytes
            )));
        }
        if self.head.len() < HEAD_BYTES {
            let wanted = (HEAD_BYTES - self.head.len()).min(bytes.len());
            self.head.extend_from_slice(&bytes[..wanted]);
        }
        self.md5.update(bytes);
        self.sha256.update(bytes);
        self.sha512.update(bytes);
        self.file.write_all(bytes).map_err(failed)
    }

    /// Ends it: looks at the content, syncs it.
    pub(crate) fn finish(self) -> Result<Arrived, Error> {
        check_content(&self.head)?;
        let info = ImageInfo {
            sha512: hex::encode(self.sha512.finalize()),
            sha256: hex::encode(self.sha256.finalize()),
            md5: hex::encode(self.md5.finalize()),
            size_bytes: self.size_bytes,
            virtual_size_bytes: self.size_bytes,
            kind: kind(&self.head),
        };
        self.file.sync_all().map_err(failed)?;
        Ok(Arrived { staging: self.staging, info })
    }
}

/// The error where an image is not the one that was asked for.
pub(crate) fn check_hash(info: &ImageInfo, sha512: &str, size_bytes: u64) -> Result<(), Error> {
    if info.sha512 == sha512 && info.size_bytes == size_bytes {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::HashMismatch,
        format!(
            "received {} bytes with SHA-512 {}, asked for {size_bytes} bytes with {sha512}",
            info.size_bytes, info.sha512
        ),
    ))
}

fn failed(error: io::Error) -> Error {
    Error::io("write an image", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_told_by_its_magic() {
        let mut bzimage = vec![0; 1024];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(kind(&bzimage), ImageKind::Bzimage);
        assert_eq!(kind(b"\x7fELF\x02\x01"), ImageKind::Elf);
        assert_eq!(kind(b""), ImageKind::Disk);
        assert_eq!(kind(&[0; 0x204]), ImageKind::Disk);
    }

    #[test]
    fn a_container_format_is_no_raw_image() {
        for content in [&b"QFI\xfb\0\0\0\x03"[..], b"KDMV\x01", b"conectix\0\0"] {
            assert_eq!(check_content(content).unwrap_err().kind, ErrorKind::Invalid);
        }
        assert!(check_content(b"QF").is_ok());
        assert_eq!(check_format("qcow2").unwrap_err().kind, ErrorKind::Invalid);
        assert!(check_format("raw").is_ok());
    }
}
