//! A disk in memory that loses, tears and damages as real ones do.
//!
//! Bytes reach the durable image only by a sync; names only by a sync of their directory. At a
//! crash everything since is lost, kept, or kept in part, sector by sector, as a seed decides.
//! Every operation has a number, so that a test can stop the machine at each one in turn.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::disk::{Disk, DiskFile};

/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// What a crash does to writes that were not flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// They are all there: only the process died.
    Nothing,
    /// None is there.
    All,
    /// They are there up to a random point, in their order, the last one torn within a sector.
    Prefix,
    /// Each sector and each name is there or not, by chance.
    Random,
}

/// A disk in memory. Clones are the same disk; [`SimDisk::crash`] makes all earlier ones unusable.
#[derive(Clone)]
pub struct SimDisk {
    shared: Arc<Mutex<Inner>>,
    epoch: u64,
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDisk").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Inner {
    seed: u64,
    epoch: u64,
    files: BTreeMap<u64, Inode>,
    next_file: u64,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    /// Changes of names since their directory was last flushed.
    renamed: Vec<(PathBuf, Option<u64>)>,
    locks: BTreeSet<PathBuf>,
    operations: u64,
    digest: u32,
    off_at: Option<u64>,
    capacity_bytes: Option<u64>,
    failing_syncs: u32,
}

#[derive(Default, Clone)]
struct Inode {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    unflushed: Vec<(u64, Vec<u8>)>,
}

/// A file of a [`SimDisk`].
pub struct SimFile {
    disk: SimDisk,
    file: u64,
}

/// A lock of a [`SimDisk`].
pub struct SimLock {
    disk: SimDisk,
    path: PathBuf,
}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut inner = self.disk.inner();
        if inner.epoch == self.disk.epoch {
            inner.locks.remove(&self.path);
        }
    }
}

impl SimDisk {
    /// An empty disk of endless size without faults.
    pub fn new(seed: u64) -> Self {
        let inner = Inner { seed: seed.wrapping_add(0x9e37_79b9_7f4a_7c15), ..Inner::default() };
        Self { shared: Arc::new(Mutex::new(inner)), epoch: 0 }
    }

    /// The machine stops and starts again: this is its disk from then on. Everything that was open
    /// answers errors.
    #[must_use = "the old handle is unusable"]
    pub fn crash(&self, loss: Loss) -> Self {
        let mut inner = self.inner();
        inner.crash(loss);
        let epoch = inner.epoch;
        drop(inner);
        Self { shared: self.shared.clone(), epoch }
    }

    /// A copy of the whole disk as it is, faults included, that goes its own way.
    #[must_use = "this disk is not changed"]
    pub fn fork(&self, seed: u64) -> Self {
        let inner = self.inner();
        let copy = Inner {
            seed: seed.wrapping_add(0x9e37_79b9_7f4a_7c15),
            epoch: inner.epoch,
            files: inner.files.clone(),
            next_file: inner.next_file,
            names: inner.names.clone(),
            durable_names: inner.durable_names.clone(),
            renamed: inner.renamed.clone(),
            ..Inner::default()
        };
        Self { shared: Arc::new(Mutex::new(copy)), epoch: self.epoch }
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.inner().operations
    }

    /// A checksum over every operation so far: equal runs have equal ones.
    pub fn digest(&self) -> u32 {
        self.inner().digest
    }

    /// From this operation on (counted from the disk's beginning) nothing works until
    /// [`SimDisk::crash`].
    pub fn power_off_at(&self, operation: u64) {
        self.inner().off_at = Some(operation);
    }

    /// Nothing works any more until [`SimDisk::crash`]: call it before a node's tasks are dropped, so
    /// that nothing they do on their way out reaches the disk.
    pub fn power_off(&self) {
        self.inner().off_at = Some(0);
    }

    /// How many bytes all files together may have; `None` for endless.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.inner().capacity_bytes = bytes;
    }

    /// Bytes that all files have.
    pub fn used_bytes(&self) -> u64 {
        self.inner().used_bytes()
    }

    /// The next syncs of a file fail, and what they should have flushed never becomes durable.
    pub fn fail_syncs(&self, count: u32) {
        self.inner().failing_syncs = count;
    }

    /// Changes a file behind everybody's back, durably. Returns whether it is there.
    pub fn damage(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> bool {
        let mut inner = self.inner();
        let Some(file) = inner.names.get(path).copied() else {
            return false;
        };
        let inode = inner.files.entry(file).or_default();
        change(&mut inode.bytes);
        inode.durable.clone_from(&inode.bytes);
        inode.unflushed.clear();
        true
    }

    /// Removes a file behind everybody's back, durably.
    pub fn lose(&self, path: &Path) {
        let mut inner = self.inner();
        inner.names.remove(path);
        inner.durable_names.remove(path);
        inner.renamed.retain(|(name, _)| name != path);
    }

    /// Every file there is, with its length.
    pub fn paths(&self) -> Vec<(PathBuf, usize)> {
        let inner = self.inner();
        let length = |file| inner.files.get(file).map_or(0, |inode| inode.bytes.len());
        inner.names.iter().map(|(path, file)| (path.clone(), length(file))).collect()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an operation, and refuses it when the machine is off.
    fn operation(
        &self,
        name: &str,
        path: &Path,
        size_bytes: usize,
    ) -> io::Result<MutexGuard<'_, Inner>> {
        let mut inner = self.inner();
        if inner.epoch != self.epoch || inner.off_at.is_some_and(|at| inner.operations >= at) {
            return Err(io::Error::other("the machine is off"));
        }
        inner.operations += 1;
        inner.note(name.as_bytes());
        inner.note(path.as_os_str().as_encoded_bytes());
        inner.note(&size_bytes.to_le_bytes());
        Ok(inner)
    }
}

impl Inner {
    fn note(&mut self, bytes: &[u8]) {
        self.digest = crc32c::crc32c_append(self.digest, bytes);
    }

    /// SplitMix64: a small generator that needs nothing but its seed.
    fn random(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.seed;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.random() % (limit.max(1) as u64)) as usize
    }

    fn used_bytes(&self) -> u64 {
        let length = |file| self.files.get(file).map_or(0, |inode| inode.bytes.len() as u64);
        self.names.values().map(length).sum()
    }

    fn file(&self, path: &Path) -> io::Result<u64> {
        self.names.get(path).copied().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    fn set_name(&mut self, path: &Path, file: Option<u64>) {
        match file {
            Some(file) => self.names.insert(path.to_owned(), file),
            None => self.names.remove(path),
        };
        self.renamed.push((path.to_owned(), file));
    }

    fn crash(&mut self, loss: Loss) {
        self.epoch += 1;
        self.off_at = None;
        self.locks.clear();
        let files: Vec<u64> = self.files.keys().copied().collect();
        for file in files {
            let mut inode = self.files.remove(&file).unwrap_or_default();
            let unflushed = std::mem::take(&mut inode.unflushed);
            for (offset, bytes) in self.survivors(loss, unflushed) {
                write_at(&mut inode.durable, offset, &bytes);
            }
            inode.bytes.clone_from(&inode.durable);
            self.files.insert(file, inode);
        }
        let renamed = std::mem::take(&mut self.renamed);
        let kept = match loss {
            Loss::Nothing => renamed.len(),
            Loss::All => 0,
            // Journals keep the order of names, so some are there up to a point.
            Loss::Prefix | Loss::Random => self.below(renamed.len() + 1),
        };
        for (path, file) in renamed.into_iter().take(kept) {
            match file {
                Some(file) => self.durable_names.insert(path, file),
                None => self.durable_names.remove(&path),
            };
        }
        self.names.clone_from(&self.durable_names);
        let named: BTreeSet<u64> = self.names.values().copied().collect();
        self.files.retain(|file, _| named.contains(file));
    }

    fn survivors(&mut self, loss: Loss, writes: Vec<(u64, Vec<u8>)>) -> Vec<(u64, Vec<u8>)> {
        match loss {
            Loss::Nothing => writes,
            Loss::All => Vec::new(),
            Loss::Prefix => {
                let total = writes.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
                let mut left = self.below(total + 1);
                let mut kept = Vec::new();
                for (offset, mut bytes) in writes {
                    bytes.truncate(left);
                    left -= bytes.len();
                    kept.push((offset, bytes));
                }
                kept
            }
            Loss::Random => {
                let mut kept = Vec::new();
                for (offset, bytes) in writes {
                    let sectors = sectors(offset, &bytes);
                    kept.extend(sectors.into_iter().filter(|_| self.random() & 1 == 0));
                }
                kept
            }
        }
    }
}

/// A write cut where the disk's sectors begin.
fn sectors(mut offset: u64, mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut sectors = Vec::new();
    while !bytes.is_empty() {
        let room = SECTOR_BYTES - (offset % SECTOR_BYTES as u64) as usize;
        let (head, rest) = bytes.split_at(room.min(bytes.len()));
        sectors.push((offset, head.to_vec()));
        offset += head.len() as u64;
        bytes = rest;
    }
    sectors
}

fn write_at(bytes: &mut Vec<u8>, offset: u64, written: &[u8]) {
    let offset = offset as usize;
    let end = offset + written.len();
    if !written.is_empty() && bytes.len() < end {
        bytes.resize(end, 0);
    }
    if !written.is_empty() {
        bytes[offset..end].copy_from_slice(written);
    }
}

impl Disk for SimDisk {
    type File = SimFile;
    type Lock = SimLock;
    const BLOCKING: bool = false;
    const SEGMENT_BYTES: u64 = 32 << 10;

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.operation("create_dir", path, 0).map(drop)
    }

    fn lock(&self, path: &Path) -> io::Result<Option<SimLock>> {
        let mut inner = self.operation("lock", path, 0)?;
        let free = inner.locks.insert(path.to_owned());
        Ok(free.then(|| SimLock { disk: self.clone(), path: path.to_owned() }))
    }

    fn create(&self, path: &Path) -> io::Result<SimFile> {
        let mut inner = self.operation("create", path, 0)?;
        let file = inner.next_file;
        inner.next_file += 1;
        inner.files.insert(file, Inode::default());
        inner.set_name(path, Some(file));
        Ok(SimFile { disk: self.clone(), file })
    }

    fn open(&self, path: &Path) -> io::Result<SimFile> {
        let file = self.operation("open", path, 0)?.file(path)?;
        Ok(SimFile { disk: self.clone(), file })
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let inner = self.operation("read", path, 0)?;
        let file = inner.file(path)?;
        Ok(inner.files.get(&file).map(|inode| inode.bytes.clone()).unwrap_or_default())
    }

    fn len(&self, path: &Path) -> io::Result<u64> {
        let inner = self.operation("len", path, 0)?;
        let file = inner.file(path)?;
        Ok(inner.files.get(&file).map_or(0, |inode| inode.bytes.len() as u64))
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        let inner = self.operation("list", directory, 0)?;
        let within = |path: &&PathBuf| path.parent() == Some(directory);
        Ok(inner.names.keys().filter(within).cloned().collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut inner = self.operation("rename", to, 0)?;
        let file = inner.file(from)?;
        inner.set_name(from, None);
        // One step of the journal: the old name is never gone before the new one is there.
        let removed = inner.renamed.pop();
        inner.set_name(to, Some(file));
        inner.renamed.extend(removed);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut inner = self.operation("remove", path, 0)?;
        inner.file(path)?;
        inner.set_name(path, None);
        Ok(())
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        let mut inner = self.operation("sync_dir", directory, 0)?;
        let renamed = std::mem::take(&mut inner.renamed);
        for (path, file) in renamed {
            if path.parent() != Some(directory) {
                inner.renamed.push((path, file));
                continue;
            }
            match file {
                Some(file) => inner.durable_names.insert(path, file),
                None => inner.durable_names.remove(&path),
            };
        }
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let name = PathBuf::from(self.file.to_string());
        let mut inner = self.disk.operation("write", &name, bytes.len())?;
        inner.note(bytes);
        let used = inner.used_bytes();
        let capacity = inner.capacity_bytes;
        let inode = inner.files.entry(self.file).or_default();
        let grown = (offset + bytes.len() as u64).saturating_sub(inode.bytes.len() as u64);
        if grown > 0 && capacity.is_some_and(|capacity| used + grown > capacity) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        write_at(&mut inode.bytes, offset, bytes);
        inode.unflushed.push((offset, bytes.to_vec()));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let name = PathBuf::from(self.file.to_string());
        let mut inner = self.disk.operation("sync", &name, 0)?;
        let fails = inner.failing_syncs > 0;
        inner.failing_syncs = inner.failing_syncs.saturating_sub(1);
        let inode = inner.files.entry(self.file).or_default();
        let unflushed = std::mem::take(&mut inode.unflushed);
        if fails {
            return Err(io::Error::other("Input/output error"));
        }
        for (offset, bytes) in unflushed {
            write_at(&mut inode.durable, offset, &bytes);
        }
        Ok(())
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_flushed_bytes_and_names_survive_the_loss_of_all() {
        let disk = SimDisk::new(1);
        let (directory, kept, lost) = (Path::new("d"), Path::new("d/kept"), Path::new("d/lost"));
        let file = disk.create(kept).expect("create");
        file.write_all_at(b"one", 0).expect("write");
        file.sync_data().expect("sync");
        disk.sync_dir(directory).expect("sync");
        file.write_all_at(b"two", 3).expect("write");
        disk.create(lost).expect("create");
        let after = disk.crash(Loss::All);
        assert_eq!(after.list(directory).expect("list"), [kept.to_owned()]);
        assert_eq!(after.read(kept).expect("read"), b"one");
        assert!(file.write_all_at(b"x", 0).is_err() && disk.read(kept).is_err());
    }

    #[test]
    fn a_process_that_dies_alone_loses_nothing() {
        let disk = SimDisk::new(1);
        disk.create(Path::new("d/a")).expect("create").write_all_at(b"x", 0).expect("write");
        disk.rename(Path::new("d/a"), Path::new("d/b")).expect("rename");
        let after = disk.crash(Loss::Nothing);
        assert_eq!(after.read(Path::new("d/b")).expect("read"), b"x");
        assert!(after.read(Path::new("d/a")).is_err());
    }

    #[test]
    fn bytes_of_a_failed_sync_never_become_durable_and_a_full_disk_refuses_growth_only() {
        let disk = SimDisk::new(1);
        let path = Path::new("d/a");
        let file = disk.create(path).expect("create");
        disk.sync_dir(Path::new("d")).expect("sync");
        file.write_all_at(b"abc", 0).expect("write");
        disk.fail_syncs(1);
        assert!(file.sync_data().is_err());
        file.sync_data().expect("the next one succeeds");
        disk.set_capacity(Some(3));
        let full = file.write_all_at(b"d", 3).expect_err("full");
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        file.write_all_at(b"x", 0).expect("what exists can be overwritten");
        assert_eq!(disk.crash(Loss::All).read(path).expect("read"), b"");
    }

    #[test]
    fn a_torn_write_differs_by_seed_and_is_the_same_for_the_same_seed() {
        let torn = |seed| {
            let disk = SimDisk::new(seed);
            let file = disk.create(Path::new("d/a")).expect("create");
            disk.sync_dir(Path::new("d")).expect("sync");
            file.write_all_at(&[1; 64 * SECTOR_BYTES], 0).expect("write");
            disk.crash(Loss::Random).read(Path::new("d/a")).expect("read")
        };
        assert_eq!(torn(5), torn(5));
        assert_ne!(torn(5), torn(6));
    }
}
