//! The lease of a host on writing: one page that `trine node` renews and every guest's process reads.
//!
//! A host that lost the cluster must stop changing disks before others may act for it, whatever its
//! node process does meanwhile: it may be dead, stopped or cut off. So the permission to write is a
//! point in time that passes by itself, on CLOCK_BOOTTIME, which goes on while a host is suspended.
//!
//! ```text
//! offset  size  what
//!      0     8  "TRINELSE"
//!      8     4  version, 1
//!     16     8  writes_until_ns: CLOCK_BOOTTIME until which disks may be changed
//!     24     8  the same, every bit inverted
//! ```
//! All little-endian, in a file of [`PAGE_BYTES`].
//!
//! The node writes with `pwrite`, which needs no space once the page is there and fails with an
//! error where a mapping would fail with a signal. Readers map the page; the second copy shows them
//! a value that is only half written, which they take for no permission. A page belongs to one boot
//! of one host (its file's name says which), because the clock begins anew with each.

use rustix::fd::OwnedFd;
use rustix::fs::fstat;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bytes of the file.
pub const PAGE_BYTES: usize = 4096;
/// Its first 8 bytes.
pub const MAGIC: u64 = u64::from_le_bytes(*b"TRINELSE");
/// Version of the layout.
pub const VERSION: u32 = 1;

const AT_VERSION: usize = 8;
const AT_UNTIL: usize = 16;
const AT_INVERTED: usize = 24;
/// How often a reader looks again at a value that is being written.
const READS_MAX: usize = 64;

/// Why a lease page can't be used.
#[derive(Debug)]
pub enum LeaseError {
    /// The file can't be made, opened, read or mapped.
    Io {
        /// The file, or `descriptor`.
        page: PathBuf,
        /// What was tried.
        act: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file is something else.
    Layout {
        /// The file, or `descriptor`.
        page: PathBuf,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

impl fmt::Display for LeaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { page, act, source } => {
                write!(f, "lease page {}: {act}: {source}", page.display())
            }
            Self::Layout { page, reason } => write!(
                f,
                "lease page {}: {reason}; stop the host's guests and node, remove the file and \
                 start the node again",
                page.display()
            ),
        }
    }
}

impl std::error::Error for LeaseError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::Layout { .. } => None,
        }
    }
}

/// CLOCK_BOOTTIME: since the host's start, suspensions included.
pub fn now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// The node's side: renews.
#[derive(Debug)]
pub struct LeasePage {
    path: PathBuf,
    file: File,
}

impl LeasePage {
    /// Opens the page at `path`; one that does not exist is made, without permission to write.
    ///
    /// # Errors
    /// Where the file can't be used or has another layout: its readers would not follow.
    pub fn open(path: &Path) -> Result<LeasePage, LeaseError> {
        let failed = |act| move |source| LeaseError::Io { page: path.to_owned(), act, source };
        let exists = path.try_exists().map_err(failed("look for it"))?;
        if !exists {
            Self::make(path).map_err(failed("make it"))?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(failed("open it to write"))?;
        let page = LeasePage { path: path.to_owned(), file };
        page.check()?;
        Ok(page)
    }

    /// The whole page under another name, then renamed: a reader never sees half of it.
    fn make(path: &Path) -> io::Result<()> {
        let mut bytes = [0; PAGE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[AT_VERSION..AT_VERSION + 4].copy_from_slice(&VERSION.to_le_bytes());
        bytes[AT_UNTIL..AT_UNTIL + 16].copy_from_slice(&words(0));
        let half = path.with_extension("new");
        let file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&half)?;
        file.write_all_at(&bytes, 0)?;
        // The file system's room for the page is taken now, and not at a renewal on a full disk.
        file.sync_all()?;
        std::fs::rename(&half, path)
    }

    fn check(&self) -> Result<(), LeaseError> {
        let mut bytes = [0; PAGE_BYTES];
        let read = self.file.read_exact_at(&mut bytes, 0);
        read.map_err(|source| LeaseError::Io {
            page: self.path.clone(),
            act: "read its 4096 bytes",
            source,
        })?;
        check_head(&bytes).map_err(|reason| LeaseError::Layout { page: self.path.clone(), reason })
    }

    /// Disks may be changed until `until`, on the clock of [`now`]; an earlier point than before
    /// takes permission back.
    pub fn renew(&self, until: Duration) -> Result<(), LeaseError> {
        let until_ns = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
        self.file.write_all_at(&words(until_ns), AT_UNTIL as u64).map_err(|source| LeaseError::Io {
            page: self.path.clone(),
            act: "renew it",
            source,
        })
    }

    /// A read-only descriptor for a guest's process.
    pub fn reader(&self) -> Result<OwnedFd, LeaseError> {
        File::open(&self.path).map(OwnedFd::from).map_err(|source| LeaseError::Io {
            page: self.path.clone(),
            act: "open it to read",
            source,
        })
    }

    /// Until when disks may be changed; zero where they may not.
    pub fn writes_until(&self) -> Duration {
        let mut bytes = [0; 16];
        match self.file.read_exact_at(&mut bytes, AT_UNTIL as u64) {
            Ok(()) => {
                let word = |at: usize| {
                    bytes[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
                };
                permission(word(0), word(8)).unwrap_or_default()
            }
            Err(_) => Duration::ZERO,
        }
    }
}

fn words(until_ns: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&until_ns.to_le_bytes());
    bytes[8..].copy_from_slice(&(!until_ns).to_le_bytes());
    bytes
}

fn permission(until_ns: u64, inverted: u64) -> Option<Duration> {
    (until_ns == !inverted).then(|| Duration::from_nanos(until_ns))
}

fn check_head(bytes: &[u8]) -> Result<(), String> {
    let version = u32::from_le_bytes([
        bytes[AT_VERSION],
        bytes[AT_VERSION + 1],
        bytes[AT_VERSION + 2],
        bytes[AT_VERSION + 3],
    ]);
    if bytes[..8] != MAGIC.to_le_bytes() {
        return Err("it does not begin with TRINELSE".into());
    }
    if version != VERSION {
        return Err(format!("version {version}; this program reads {VERSION}"));
    }
    Ok(())
}

/// A guest's side: looks.
#[derive(Debug)]
pub struct LeaseView {
    page: NonNull<u8>,
}

// SAFETY: the mapping lives until drop and is only read, by atomics.
unsafe impl Send for LeaseView {}
// SAFETY: as above.
unsafe impl Sync for LeaseView {}

impl LeaseView {
    /// Maps a page read-only.
    pub fn map(page: OwnedFd) -> Result<LeaseView, LeaseError> {
        let name = || PathBuf::from("descriptor");
        let failed = |act| {
            move |error: rustix::io::Errno| LeaseError::Io {
                page: name(),
                act,
                source: error.into(),
            }
        };
        let size_bytes = fstat(&page).map_err(failed("find its size"))?.st_size;
        if size_bytes != PAGE_BYTES as i64 {
            let reason = format!("{size_bytes} bytes; it has {PAGE_BYTES}");
            return Err(LeaseError::Layout { page: name(), reason });
        }
        // SAFETY: a fresh shared mapping, nothing else refers to the address.
        let address = unsafe {
            mmap(std::ptr::null_mut(), PAGE_BYTES, ProtFlags::READ, MapFlags::SHARED, &page, 0)
        };
        let address = address.map_err(failed("map it"))?;
        let view =
            LeaseView { page: NonNull::new(address.cast()).expect("mmap never maps address 0") };
        let mut head = [0; 16];
        for (index, word) in head.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&view.word(index * 8).load(Ordering::Relaxed).to_ne_bytes());
        }
        check_head(&head).map_err(|reason| LeaseError::Layout { page: name(), reason })?;
        Ok(view)
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        // SAFETY: `at` is one of the layout's 8-aligned offsets, inside the live mapping; an atomic
        // load of a read-only page is a plain load.
        unsafe { AtomicU64::from_ptr(self.page.as_ptr().add(at).cast()) }
    }

    /// Until when disks may be changed; zero where they may not.
    pub fn writes_until(&self) -> Duration {
        for _ in 0..READS_MAX {
            let until_ns = u64::from_le(self.word(AT_UNTIL).load(Ordering::Acquire));
            let inverted = u64::from_le(self.word(AT_INVERTED).load(Ordering::Acquire));
            if let Some(until) = permission(until_ns, inverted) {
                return until;
            }
            std::hint::spin_loop();
        }
        Duration::ZERO
    }

    /// Whether disks may be changed now.
    pub fn allows_writes(&self) -> bool {
        now() < self.writes_until()
    }
}

impl Drop for LeaseView {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length and unmapped only here.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), PAGE_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> PathBuf {
        let name = format!("trine-lease-{}-{:?}", std::process::id(), std::thread::current().id());
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_file(&path);
        path
    }

    #[test]
    fn a_fresh_page_allows_nothing_and_a_renewal_is_seen_through_the_mapping() {
        let path = place();
        let page = LeasePage::open(&path).unwrap();
        let view = LeaseView::map(page.reader().unwrap()).unwrap();
        assert!(!view.allows_writes());
        let until = now() + Duration::from_secs(3600);
        page.renew(until).unwrap();
        assert_eq!((view.writes_until(), page.writes_until()), (until, until));
        assert!(view.allows_writes());
        // A node that restarts finds the same page, with what its guests go by.
        let again = LeasePage::open(&path).unwrap();
        assert_eq!(again.writes_until(), until);
        again.renew(Duration::ZERO).unwrap();
        assert!(!view.allows_writes());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_value_that_is_half_written_allows_nothing() {
        let path = place();
        let page = LeasePage::open(&path).unwrap();
        let view = LeaseView::map(page.reader().unwrap()).unwrap();
        page.file.write_all_at(&u64::MAX.to_le_bytes(), AT_UNTIL as u64).unwrap();
        assert_eq!((view.writes_until(), page.writes_until()), (Duration::ZERO, Duration::ZERO));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn another_layout_is_refused_on_both_sides() {
        let path = place();
        let page = LeasePage::open(&path).unwrap();
        page.file.write_all_at(&7u32.to_le_bytes(), AT_VERSION as u64).unwrap();
        let error = LeaseView::map(page.reader().unwrap()).unwrap_err().to_string();
        assert!(error.contains("version 7"), "{error}");
        let error = LeasePage::open(&path).unwrap_err().to_string();
        assert!(error.contains("version 7") && error.contains("trine-lease"), "{error}");
        page.file.set_len(100).unwrap();
        let error = LeaseView::map(page.reader().unwrap()).unwrap_err().to_string();
        assert!(error.contains("100 bytes"), "{error}");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_readers_descriptor_can_not_write() {
        let path = place();
        let page = LeasePage::open(&path).unwrap();
        let reader = File::from(page.reader().unwrap());
        assert!(reader.write_at(&[1], 0).is_err());
        std::fs::remove_file(&path).unwrap();
    }
}
