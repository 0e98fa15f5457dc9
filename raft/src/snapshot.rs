//! Snapshot files: written beside, flushed, renamed; the newest two are kept.
//!
//! ```text
//! magic "TRINESNP" | version u32 | node id u64 | cluster id 16 | meta length u32 | meta
//! | time_ms u64 | removed ids: count u32, u64 each | state length u64 | state | crc32c u32 over all before it
//! ```

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    codec::{DecodeError, Decoder, Encoder},
    disk::{self, Disk},
    types::{Snapshot, SnapshotData, SnapshotMeta},
    wal::Identity,
};

const MAGIC: &[u8; 8] = b"TRINESNP";
const VERSION: u32 = 2;
const SUFFIX: &str = ".snap";
const SUFFIX_NEW: &str = ".snap.new";
const KEPT: usize = 2;
/// The largest snapshot that is written, sent or read.
pub(crate) const SNAPSHOT_BYTES_MAX: usize = 1 << 30;

/// Why a snapshot can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The file system refused.
    #[error("can't {act} {path}")]
    Io {
        /// What was tried.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// What it answered.
        #[source]
        source: io::Error,
    },
    /// Its bytes are not what was written, or not ours.
    #[error("the snapshot {path} can't be used: {reason}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// The directory of a node's snapshots.
#[derive(Debug, Clone)]
pub(crate) struct SnapshotFiles<D> {
    disk: D,
    directory: PathBuf,
    identity: Identity,
}

/// Where the state machine keeps its snapshots, whatever disk that is on.
pub(crate) trait Snapshots: Send + Sync + 'static {
    /// Makes a snapshot durable.
    fn save(&self, meta: &SnapshotMeta, data: &SnapshotData) -> Result<(), SnapshotError>;
    /// The newest one that can be read.
    fn newest(&self) -> Result<Option<Snapshot>, SnapshotError>;
}

impl<D: Disk> Snapshots for SnapshotFiles<D> {
    fn save(&self, meta: &SnapshotMeta, data: &SnapshotData) -> Result<(), SnapshotError> {
        SnapshotFiles::save(self, meta, data)
    }

    fn newest(&self) -> Result<Option<Snapshot>, SnapshotError> {
        SnapshotFiles::newest(self)
    }
}

impl<D: Disk> SnapshotFiles<D> {
    pub(crate) fn open(
        disk: D,
        directory: PathBuf,
        identity: Identity,
    ) -> Result<Self, SnapshotError> {
        disk.create_dir(&directory).map_err(io_error("create", &directory))?;
        let files = Self { disk, directory, identity };
        for path in files.paths(SUFFIX_NEW)? {
            files.disk.remove(&path).map_err(io_error("remove", &path))?;
        }
        Ok(files)
    }

    /// A directory that is only read.
    pub(crate) fn at(disk: D, directory: PathBuf, identity: Identity) -> Self {
        Self { disk, directory, identity }
    }

    /// Makes a snapshot durable, then removes those nobody needs any more.
    pub(crate) fn save(
        &self,
        meta: &SnapshotMeta,
        data: &SnapshotData,
    ) -> Result<(), SnapshotError> {
        let name = match meta.last_log_id {
            Some(id) => format!("{:020}-{}-{}", id.index, id.leader_id.term, id.leader_id.node_id),
            None => format!("{:020}-empty", 0),
        };
        let temporary = self.directory.join(format!("{name}{SUFFIX_NEW}"));
        let path = self.directory.join(format!("{name}{SUFFIX}"));
        let bytes = encode(self.identity, meta, data);
        disk::replace(&self.disk, &temporary, &path, &bytes).map_err(io_error("write", &path))?;
        self.remove_older()
    }

    /// The newest snapshot that can be read; a damaged one is passed over with a warning.
    pub(crate) fn newest(&self) -> Result<Option<Snapshot>, SnapshotError> {
        let (snapshot, damage) = self.newest_and_damage()?;
        for error in damage {
            tracing::error!(%error, "passing over a snapshot");
        }
        Ok(snapshot)
    }

    /// The newest snapshot that can be read, and why newer ones can't.
    pub(crate) fn newest_and_damage(
        &self,
    ) -> Result<(Option<Snapshot>, Vec<String>), SnapshotError> {
        let mut damage = Vec::new();
        for path in self.paths(SUFFIX)?.iter().rev() {
            match self.load(path) {
                Ok(snapshot) => return Ok((Some(snapshot), damage)),
                Err(error) => damage.push(error.to_string()),
            }
        }
        Ok((None, damage))
    }

    /// Whether there is no snapshot at all.
    pub(crate) fn is_empty(&self) -> Result<bool, SnapshotError> {
        Ok(self.paths(SUFFIX)?.is_empty())
    }

    fn load(&self, path: &Path) -> Result<Snapshot, SnapshotError> {
        let unusable = |reason: String| SnapshotError::Unusable { path: path.to_owned(), reason };
        let length = self.disk.len(path).map_err(io_error("read", path))?;
        if length > SNAPSHOT_BYTES_MAX as u64 + (1 << 20) {
            return Err(unusable("it is larger than any snapshot".to_owned()));
        }
        let bytes = self.disk.read(path).map_err(io_error("read", path))?;
        decode(self.identity, &bytes).map_err(|error| unusable(error.to_string()))
    }

    fn remove_older(&self) -> Result<(), SnapshotError> {
        let paths = self.paths(SUFFIX)?;
        for path in paths.iter().take(paths.len().saturating_sub(KEPT)) {
            self.disk.remove(path).map_err(io_error("remove", path))?;
        }
        Ok(())
    }

    /// Files with this ending, oldest first.
    fn paths(&self, suffix: &str) -> Result<Vec<PathBuf>, SnapshotError> {
        let mut paths =
            self.disk.list(&self.directory).map_err(io_error("list", &self.directory))?;
        paths.retain(|path| path.to_str().is_some_and(|name| name.ends_with(suffix)));
        Ok(paths)
    }
}

fn encode(identity: Identity, meta: &SnapshotMeta, data: &SnapshotData) -> Vec<u8> {
    let mut meta_bytes = Encoder::default();
    meta_bytes.snapshot_meta(meta);
    let mut file = Encoder(Vec::with_capacity(data.state.len() + 256));
    file.raw(MAGIC);
    file.u32(VERSION);
    file.u64(identity.node_id);
    file.raw(&identity.cluster_id);
    file.bytes(&meta_bytes.0);
    file.u64(data.time_ms);
    file.ids(&data.removed);
    file.u64(data.state.len() as u64);
    file.raw(&data.state);
    let crc = crc32c::crc32c(&file.0);
    file.u32(crc);
    file.0
}

fn decode(identity: Identity, bytes: &[u8]) -> Result<Snapshot, DecodeError> {
    let body_bytes = bytes.len().saturating_sub(4);
    let (body, crc) = bytes.split_at(body_bytes);
    if crc != crc32c::crc32c(body).to_le_bytes() {
        return Err(DecodeError("a snapshot whose checksum is wrong"));
    }
    let mut decoder = Decoder(body);
    if decoder.take(8)? != MAGIC || decoder.u32()? != VERSION {
        return Err(DecodeError("a snapshot of an unknown version"));
    }
    let (node_id, cluster_id) = (decoder.u64()?, decoder.id()?);
    if (node_id, cluster_id) != (identity.node_id, identity.cluster_id) {
        return Err(DecodeError("a snapshot of another node or cluster"));
    }
    let mut meta_decoder = Decoder(decoder.bytes()?);
    let meta = meta_decoder.snapshot_meta()?;
    meta_decoder.end()?;
    let time_ms = decoder.u64()?;
    let removed = decoder.ids()?;
    let length = usize::try_from(decoder.u64()?).map_err(|_| DecodeError("a snapshot's length"))?;
    let state = Arc::new(decoder.take(length)?.to_vec());
    decoder.end()?;
    Ok(Snapshot { meta, snapshot: SnapshotData { time_ms, removed, state } })
}

fn io_error(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::Io { act, path, source }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        disk::HostDisk,
        types::{LeaderId, LogId},
    };

    const IDENTITY: Identity = Identity { cluster_id: [9; 16], node_id: 1 };

    fn meta(index: u64) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: Some(LogId::new(LeaderId { term: 1, node_id: 1 }, index)),
            ..SnapshotMeta::default()
        }
    }

    fn data(state: &[u8]) -> SnapshotData {
        SnapshotData { time_ms: 5, removed: [7].into(), state: Arc::new(state.to_vec()) }
    }

    #[test]
    fn keeps_the_newest_two_and_falls_back_when_the_newest_is_damaged() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let files =
            SnapshotFiles::open(HostDisk, directory.path().to_owned(), IDENTITY).expect("open");
        for index in [3, 20, 100] {
            files.save(&meta(index), &data(b"state")).expect("save");
        }
        let paths = files.paths(SUFFIX).expect("list");
        assert_eq!(paths.len(), KEPT);
        let newest = files.newest().expect("read").expect("there");
        assert_eq!(newest.meta, meta(100));
        assert_eq!(newest.snapshot, data(b"state"));

        let mut bytes = fs::read(&paths[1]).expect("read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&paths[1], bytes).expect("damage");
        assert_eq!(files.newest().expect("read").expect("there").meta, meta(20));
    }

    #[test]
    fn refuses_a_snapshot_of_another_cluster() {
        let bytes = encode(IDENTITY, &meta(1), &data(b"x"));
        let other = Identity { cluster_id: [8; 16], ..IDENTITY };
        assert!(decode(other, &bytes).is_err());
        for length in 0..bytes.len() {
            assert!(decode(IDENTITY, &bytes[..length]).is_err());
        }
    }

    #[test]
    fn a_snapshot_has_the_bytes_it_had_in_version_2() {
        let bytes = encode(IDENTITY, &SnapshotMeta::default(), &data(b"s"));
        let mut golden = b"TRINESNP\x02\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
        golden.extend_from_slice(&[9; 16]);
        golden.extend_from_slice(&[10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&5u64.to_le_bytes());
        golden.extend_from_slice(&[1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&1u64.to_le_bytes());
        golden.push(b's');
        assert_eq!(bytes[..bytes.len() - 4], golden);
    }
}
