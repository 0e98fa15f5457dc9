//! Opening a log: reading what is there, telling a torn last write from damage, and repairing.
//!
//! ```text
//! begin   lock ─► state file ─► segments in order, frame by frame, up to the first damage
//! finish  (with the newest snapshot that can be read)
//!         no damage ─► cut a torn tail off ─► write on
//!         damage    ─► note "healing" ─► remove what follows the damage, newest first
//!                   ─► cut the segment at the damage ─► lower the mark ─► write on, without a vote
//! ```
//! Each step can be interrupted: the note is durable before anything is removed and the mark of
//! acknowledged frames stays above what is left until all is done, so the next start finds the
//! damage again and does the same.

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
};

use super::{
    LOCK_FILE, Record, Recovered, WalError,
    frame::{Frame, decode_frame, decode_records, encode_frame, later_frames, was_written_whole},
    io_error, latest_of,
    segment::{self, Header, Identity, Owner, SEGMENT_HEADER_BYTES, Segment},
    state_file::{self, Found, StateFile},
    writer::{Shared, Writer},
};
use crate::{
    disk::{self, Disk, DiskFile},
    types::{LogId, Membership, Payload, Vote},
};

/// The largest segment file that is read back.
const SEGMENT_BYTES_MAX: u64 = 256 << 20;
/// Says that the directory's log lost something; its text says what.
const HEALING_FILE: &str = "healing";
const HEALING_FILE_NEW: &str = "healing.new";

/// Where and whose.
pub(crate) struct WalOptions {
    pub(crate) directory: PathBuf,
    pub(crate) identity: Identity,
    pub(crate) segment_bytes: u64,
    /// Random bytes that name the directory if it is new.
    pub(crate) fresh_incarnation: [u8; 16],
}

/// Acknowledged data that can't be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Damage {
    pub(crate) path: PathBuf,
    pub(crate) offset: u64,
    pub(crate) reason: String,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is damaged at byte {}: {}", self.path.display(), self.offset, self.reason)
    }
}

impl From<Damage> for WalError {
    fn from(damage: Damage) -> Self {
        let Damage { path, offset, reason } = damage;
        Self::Corrupt { path, offset, reason }
    }
}

/// A segment whose readable frames count.
struct Scanned {
    number: u64,
    path: PathBuf,
    last_index: Option<u64>,
    capacity: u64,
    /// Where its readable frames end.
    end: usize,
    /// Bytes behind them that are not zero.
    torn_bytes: usize,
}

/// What a directory holds, read without changing it.
#[derive(Default)]
pub(crate) struct Scan {
    pub(crate) recovered: Recovered,
    pub(crate) damage: Option<Damage>,
    pub(crate) owner: Option<Owner>,
    pub(crate) state: Found,
    next_sequence: u64,
    started: bool,
    segments: Vec<Scanned>,
    /// Segments that the damage makes useless.
    beyond: Vec<PathBuf>,
    /// The newest membership behind the damage: of use only to tell who the peers are.
    lost_membership: Option<Membership>,
}

impl Scan {
    /// Reads a directory. Hard errors are what no peer can heal: another's files, another version.
    pub(crate) fn read<D: Disk>(
        disk: &D,
        directory: &Path,
        expected: Option<Identity>,
    ) -> Result<Self, WalError> {
        let state = state_file::read(disk, directory)
            .map_err(io_error("read the state file in", directory))?;
        if let Some(version) = state.version {
            let path = directory.join("state");
            return Err(WalError::Version { path, version, expected: 1 });
        }
        let mut scan = Self { state, ..Self::default() };
        if let Some(owner) = scan.state.owner {
            scan.take_owner(directory, owner, expected)?;
        }
        let listed = segment::list(disk, directory).map_err(io_error("list", directory))?;
        for (position, (number, path)) in listed.iter().enumerate() {
            if scan.damage.is_some() {
                scan.beyond.push(path.clone());
                continue;
            }
            let is_last = position + 1 == listed.len();
            scan.check_number(path, *number);
            if scan.damage.is_none() {
                scan.read_segment(disk, path, *number, is_last, expected)?;
            } else {
                scan.beyond.push(path.clone());
            }
        }
        scan.check_entries(directory);
        scan.check_mark(directory);
        if scan.damage.is_some() {
            scan.look_beyond(disk)?;
        }
        Ok(scan)
    }

    /// The newest membership that the directory knows of, in order or behind the damage.
    pub(crate) fn newest_membership(&self) -> Option<Membership> {
        self.lost_membership.clone().or_else(|| self.recovered.membership())
    }

    /// Looks for memberships behind the damage.
    fn look_beyond<D: Disk>(&mut self, disk: &D) -> Result<(), WalError> {
        let cut = self.segments.last().map(|last| (last.path.clone(), last.end));
        let beyond = self.beyond.iter().map(|path| (path.clone(), 0));
        for (path, from) in cut.into_iter().chain(beyond) {
            let bytes = read_bounded(disk, &path)?;
            let tail = bytes.get(from..).unwrap_or_default();
            let written = tail.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            let frames = later_frames(&tail[..written], self.next_sequence);
            let records =
                frames.flat_map(|frame| decode_records(frame.payload).unwrap_or_default());
            let memberships = records.filter_map(|record| match record {
                Record::Entry(entry) => match entry.payload {
                    Payload::Membership(membership) => Some(membership),
                    _ => None,
                },
                _ => None,
            });
            self.lost_membership = memberships.last().or(self.lost_membership.take());
        }
        Ok(())
    }

    /// Whether nothing was ever kept here.
    pub(crate) fn is_fresh(&self) -> bool {
        !self.state.exists && self.segments.is_empty() && self.beyond.is_empty()
    }

    fn take_owner(
        &mut self,
        path: &Path,
        owner: Owner,
        expected: Option<Identity>,
    ) -> Result<(), WalError> {
        let expected = expected.or(self.owner.map(|owner| owner.identity));
        if let Some(expected) = expected {
            segment::check_owner(path, owner.identity, expected)?;
        }
        self.owner.get_or_insert(owner);
        Ok(())
    }

    fn found(&mut self, path: &Path, offset: u64, reason: &str) {
        let reason = reason.to_owned();
        self.damage.get_or_insert(Damage { path: path.to_owned(), offset, reason });
    }

    fn check_number(&mut self, path: &Path, number: u64) {
        if let Some(previous) = self.segments.last()
            && previous.number + 1 != number
        {
            self.found(path, 0, "the segment before it is missing");
        }
    }

    fn read_segment<D: Disk>(
        &mut self,
        disk: &D,
        path: &Path,
        number: u64,
        is_last: bool,
        expected: Option<Identity>,
    ) -> Result<(), WalError> {
        let bytes = read_bounded(disk, path)?;
        match segment::read_header(&bytes) {
            Header::Version(version) => {
                let expected = segment::VERSION;
                return Err(WalError::Version { path: path.to_owned(), version, expected });
            }
            Header::Whole { owner, number: found } if found == number => {
                self.take_owner(path, owner, expected)?;
            }
            header => {
                let reason = match header {
                    Header::Damaged(reason) => reason,
                    _ => "it has another segment's number inside",
                };
                self.found(path, 0, reason);
                self.beyond.push(path.to_owned());
                return Ok(());
            }
        }
        let mut scanned = Scanned {
            number,
            path: path.to_owned(),
            last_index: None,
            capacity: bytes.len() as u64,
            end: SEGMENT_HEADER_BYTES,
            torn_bytes: 0,
        };
        while let Some(frame) = decode_frame(&bytes[scanned.end..]) {
            if self.started && frame.sequence != self.next_sequence {
                self.lost_frames(&scanned);
                break;
            }
            self.take_frame(path, &mut scanned, &frame)?;
        }
        let tail = &bytes[scanned.end..];
        scanned.torn_bytes = tail.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        if self.damage.is_none()
            && is_last
            && later_frames(&tail[..scanned.torn_bytes], self.next_sequence).next().is_some()
        {
            self.found(path, scanned.end as u64, "valid frames follow unreadable ones");
        }
        if self.damage.is_none() && is_last && was_written_whole(tail, scanned.end) {
            self.found(path, scanned.end as u64, "the last write is whole and can't be read");
        }
        let nothing_kept = scanned.end == SEGMENT_HEADER_BYTES && self.damage.is_some();
        if nothing_kept {
            self.beyond.push(scanned.path);
        } else {
            self.segments.push(scanned);
        }
        Ok(())
    }

    /// A frame that isn't the next one: what lies between can't be read, here or at the end of the
    /// segment before.
    fn lost_frames(&mut self, scanned: &Scanned) {
        let (path, offset) = match self.segments.last() {
            Some(previous) if scanned.end == SEGMENT_HEADER_BYTES => {
                (previous.path.clone(), previous.end)
            }
            _ => (scanned.path.clone(), scanned.end),
        };
        self.found(&path, offset as u64, "valid frames follow unreadable ones");
    }

    fn take_frame(
        &mut self,
        path: &Path,
        scanned: &mut Scanned,
        frame: &Frame<'_>,
    ) -> Result<(), WalError> {
        let records = decode_records(frame.payload).map_err(|error| WalError::Corrupt {
            path: path.to_owned(),
            offset: scanned.end as u64,
            reason: format!("{error} although its checksum is right"),
        })?;
        for record in records {
            if let Record::Entry(entry) = &record {
                scanned.last_index = scanned.last_index.max(Some(entry.log_id.index));
            }
            self.recovered.apply(record);
        }
        self.started = true;
        self.next_sequence = frame.sequence + 1;
        scanned.end += frame.size_bytes;
        Ok(())
    }

    /// Drops what a purge covered although an older segment still held it, and what lies behind a
    /// hole: the segments before it are gone.
    fn check_entries(&mut self, directory: &Path) {
        let recovered = &mut self.recovered;
        let mut expected = recovered.purged.map_or(0, |id| id.index.saturating_add(1));
        recovered.entries = recovered.entries.split_off(&expected);
        let consecutive = recovered.entries.keys().take_while(|index| {
            let follows = **index == expected;
            expected = expected.saturating_add(u64::from(follows));
            follows
        });
        let count = consecutive.count();
        if count < recovered.entries.len() {
            recovered.entries.split_off(&expected);
            self.found(directory, 0, "an entry is missing before others");
        }
    }

    fn check_mark(&mut self, directory: &Path) {
        let acknowledged = self.state.acknowledged.unwrap_or(0);
        if acknowledged <= self.next_sequence {
            return;
        }
        let (path, offset) = match self.segments.last() {
            Some(last) => (last.path.clone(), last.end as u64),
            None => (directory.to_owned(), 0),
        };
        self.found(&path, offset, "the last acknowledged frames are gone");
    }
}

impl Recovered {
    fn apply(&mut self, record: Record) {
        match record {
            Record::Vote(vote) => self.vote = Some(vote),
            Record::Entry(entry) => {
                self.entries.insert(entry.log_id.index, entry);
            }
            Record::Committed(log_id) => self.committed = Some(log_id),
            Record::Truncate(None) => self.entries.clear(),
            Record::Truncate(Some(log_id)) => {
                self.entries.split_off(&log_id.index.saturating_add(1));
            }
            Record::Purge(log_id) => {
                self.entries = self.entries.split_off(&log_id.index.saturating_add(1));
                self.purged = self.purged.max(Some(log_id));
            }
        }
    }
}

fn read_bounded<D: Disk>(disk: &D, path: &Path) -> Result<Vec<u8>, WalError> {
    let length = disk.len(path).map_err(io_error("read", path))?;
    if length > SEGMENT_BYTES_MAX {
        return Err(WalError::Corrupt {
            path: path.to_owned(),
            offset: SEGMENT_BYTES_MAX,
            reason: "the file is larger than any segment".to_owned(),
        });
    }
    disk.read(path).map_err(io_error("read", path))
}

/// Whether the directory's log lost something that its peers must give back first.
pub(crate) fn healing_reason<D: Disk>(disk: &D, directory: &Path) -> io::Result<Option<String>> {
    match disk.read(&directory.join(HEALING_FILE)) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Notes durably that a log lost something.
pub(crate) fn note_healing<D: Disk>(disk: &D, directory: &Path, reason: &str) -> io::Result<()> {
    let temporary = directory.join(HEALING_FILE_NEW);
    disk::replace(disk, &temporary, &directory.join(HEALING_FILE), reason.as_bytes())
}

/// Notes durably that a log has all again.
pub(crate) fn note_healed<D: Disk>(disk: &D, directory: &Path) -> io::Result<()> {
    match disk.remove(&directory.join(HEALING_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => disk.sync_dir(directory),
    }
}

/// A log that is locked and read, and not yet repaired.
pub(crate) struct Opening<D: Disk> {
    disk: D,
    lock: D::Lock,
    options: WalOptions,
    scan: Scan,
    healing: Option<String>,
}

/// A log that is ready.
pub(crate) struct Opened<D: Disk> {
    pub(crate) wal: super::Wal,
    pub(crate) writer: Writer<D>,
    pub(crate) recovered: Recovered,
    pub(crate) incarnation: [u8; 16],
    /// What was lost, if the node must not vote.
    pub(crate) healing: Option<String>,
}

impl<D: Disk> Opening<D> {
    /// Takes the directory's lock and reads what is there.
    pub(crate) fn begin(disk: D, options: WalOptions) -> Result<Self, WalError> {
        let directory = &options.directory;
        disk.create_dir(directory).map_err(io_error("create", directory))?;
        let lock_path = directory.join(LOCK_FILE);
        let lock = disk
            .lock(&lock_path)
            .map_err(io_error("lock", &lock_path))?
            .ok_or_else(|| WalError::Locked { path: directory.clone() })?;
        segment::remove_unfinished(&disk, directory).map_err(io_error("clean", directory))?;
        let healing =
            healing_reason(&disk, directory).map_err(io_error("read the note in", directory))?;
        let scan = Scan::read(&disk, directory, Some(options.identity))?;
        Ok(Self { disk, lock, options, scan, healing })
    }

    /// What was read.
    pub(crate) fn scan(&self) -> &Scan {
        &self.scan
    }

    /// Repairs what must be repaired and makes the log ready. `snapshot` is the last entry in the
    /// newest snapshot that can be read.
    pub(crate) fn finish(mut self, snapshot: Option<LogId>) -> Result<Opened<D>, WalError> {
        let owner = self.owner()?;
        let vote = self.vote()?;
        let restart = self.join_snapshot(snapshot);
        let damage = self.scan.damage.clone();
        if let Some(damage) = &damage {
            let reason = damage.to_string();
            tracing::error!(%reason, "the log is damaged: this node abstains until it is healed");
            let directory = &self.options.directory;
            note_healing(&self.disk, directory, &reason)
                .map_err(io_error("note the damage in", directory))?;
            self.healing.get_or_insert(reason);
            self.remove_damaged(restart)?;
        }
        self.scan.recovered.vote = vote;
        let active = self.active(owner)?;
        let state = self.write_state(owner)?;
        self.ready(owner, active, state)
    }

    fn owner(&self) -> Result<Owner, WalError> {
        if let Some(owner) = self.scan.owner {
            return Ok(owner);
        }
        if self.scan.is_fresh() {
            let incarnation = self.options.fresh_incarnation;
            return Ok(Owner { identity: self.options.identity, incarnation });
        }
        let damage = self.scan.damage.clone().unwrap_or_else(|| Damage {
            path: self.options.directory.clone(),
            offset: 0,
            reason: "neither its state file nor a log segment says whose it is".to_owned(),
        });
        Err(damage.into())
    }

    /// The newest vote. It must never be forgotten: a node that votes twice in one term can give a
    /// cluster two leaders. An undamaged log holds it; of a damaged one the end may have held it, so
    /// then a slot must be readable.
    fn vote(&self) -> Result<Option<Vote>, WalError> {
        let state = &self.scan.state;
        if let Some(damage) = &self.scan.damage
            && state.slots_readable == 0
        {
            return Err(WalError::Corrupt {
                path: damage.path.clone(),
                offset: damage.offset,
                reason: format!(
                    "{}, and the state file that would still know this node's vote can't be read",
                    damage.reason
                ),
            });
        }
        Ok(greater_vote(self.scan.recovered.vote, state.vote))
    }

    /// Whether the log must begin afresh behind the snapshot, because the two don't join up. That is
    /// damage too: of the snapshot that the log was purged for, or of the log's end.
    fn join_snapshot(&mut self, snapshot: Option<LogId>) -> bool {
        let recovered = &self.scan.recovered;
        let gap = snapshot.map(|id| id.index) < recovered.purged.map(|id| id.index);
        let other = self.scan.damage.is_some()
            && snapshot.is_some_and(|snapshot| {
                let held = recovered.entries.get(&snapshot.index).map(|entry| entry.log_id);
                let newer = recovered.last() < Some(snapshot);
                held.map_or(newer, |held| held != snapshot)
            });
        if !gap && !other {
            return false;
        }
        if gap {
            let directory = self.options.directory.clone();
            self.scan.found(&directory, 0, "no snapshot covers what was dropped from the log");
        }
        let recovered = &mut self.scan.recovered;
        recovered.entries.clear();
        recovered.purged = snapshot;
        recovered.committed = snapshot;
        let kept = self.scan.segments.drain(..).map(|scanned| scanned.path);
        let kept: Vec<PathBuf> = kept.collect();
        self.scan.beyond.splice(0..0, kept);
        true
    }

    /// Removes what lies beyond the damage, newest first, so that an interruption leaves a prefix.
    fn remove_damaged(&mut self, restart: bool) -> Result<(), WalError> {
        let directory = &self.options.directory;
        for path in self.scan.beyond.drain(..).rev() {
            self.disk.remove(&path).map_err(io_error("remove", &path))?;
            self.disk.sync_dir(directory).map_err(io_error("flush", directory))?;
        }
        let recovered = &mut self.scan.recovered;
        let last = recovered.last();
        recovered.committed = recovered.committed.min(last);
        if restart {
            // The next frame is the first of its chain, above all that were acknowledged.
            let acknowledged = self.scan.state.acknowledged.unwrap_or(0);
            self.scan.next_sequence = self.scan.next_sequence.max(acknowledged);
        }
        Ok(())
    }

    /// The segment to write on: the last one without its torn or damaged tail, or a first one that
    /// begins with what the others would have said.
    fn active(&mut self, owner: Owner) -> Result<Segment<D::File>, WalError> {
        let Some(last) = self.scan.segments.last() else {
            return self.first_segment(owner);
        };
        let path = &last.path;
        let file = self.disk.open(path).map_err(io_error("open", path))?;
        if last.torn_bytes > 0 {
            let (offset, torn_bytes) = (last.end, last.torn_bytes);
            tracing::warn!(path = %path.display(), offset, torn_bytes, "cutting off a torn write");
            file.write_all_at(&vec![0; torn_bytes], offset as u64)
                .and_then(|()| file.sync_all())
                .map_err(io_error("cut a torn write off", path))?;
        }
        Ok(Segment {
            number: last.number,
            file,
            path: path.clone(),
            capacity: last.capacity,
            offset: last.end as u64,
        })
    }

    fn first_segment(&mut self, owner: Owner) -> Result<Segment<D::File>, WalError> {
        let directory = &self.options.directory;
        let checkpoint = latest_of(&self.scan.recovered).checkpoint();
        let mut prepared =
            segment::prepare(&self.disk, directory, owner, 1, self.options.segment_bytes)
                .map_err(io_error("create a log segment in", directory))?;
        if !checkpoint.is_empty() {
            let frame = encode_frame(self.scan.next_sequence, &checkpoint);
            prepared
                .file
                .write_all_at(&frame, prepared.offset)
                .and_then(|()| prepared.file.sync_all())
                .map_err(io_error("begin the log in", directory))?;
            prepared.offset += frame.len() as u64;
            self.scan.next_sequence += 1;
        }
        segment::activate(&self.disk, directory, prepared)
            .map_err(io_error("create a log segment in", directory))
    }

    /// Makes the state file say what the log says; in place, if it can be, because a full disk has no
    /// room for another.
    fn write_state(&self, owner: Owner) -> Result<StateFile<D::File>, WalError> {
        let directory = &self.options.directory;
        let vote = self.scan.recovered.vote;
        let found = &self.scan.state;
        let write = || {
            if found.owner != Some(owner) {
                let frames = self.scan.next_sequence;
                return StateFile::write(&self.disk, directory, owner, vote.as_ref(), frames);
            }
            let state = StateFile::open(&self.disk, directory)?;
            if found.slots_readable < 2 || found.vote != vote {
                state.save_vote_alone(&state_file::encode_vote(vote.as_ref()))?;
            }
            state.note_acknowledged(self.scan.next_sequence)?;
            state.flush()?;
            Ok(state)
        };
        write().map_err(io_error("write the state file in", directory))
    }

    fn ready(
        self,
        owner: Owner,
        active: Segment<D::File>,
        state: StateFile<D::File>,
    ) -> Result<Opened<D>, WalError> {
        let mut older: VecDeque<(PathBuf, Option<u64>)> = self
            .scan
            .segments
            .into_iter()
            .map(|scanned| (scanned.path, scanned.last_index))
            .collect();
        let active_last_index = older.pop_back().and_then(|(_, last_index)| last_index);
        let shared = Shared::new();
        let recovered = self.scan.recovered;
        let writer = Writer {
            shared: shared.clone(),
            disk: self.disk,
            directory: self.options.directory,
            owner,
            segment_bytes: self.options.segment_bytes,
            active,
            state,
            sequence: self.scan.next_sequence,
            latest: latest_of(&recovered),
            older,
            active_last_index,
            prepared: None,
            _lock: self.lock,
        };
        let wal = super::Wal { shared, thread: Default::default() };
        let (incarnation, healing) = (owner.incarnation, self.healing);
        Ok(Opened { wal, writer, recovered, incarnation, healing })
    }
}

/// Votes are ordered by term, candidate and whether a quorum granted them.
pub(crate) fn greater_vote(left: Option<Vote>, right: Option<Vote>) -> Option<Vote> {
    let rank = |vote: &Vote| (vote.leader_id.term, vote.leader_id.node_id, vote.committed);
    left.into_iter().chain(right).max_by_key(rank)
}
