//! The log under power cuts: a scripted life is stopped at every one of its disk operations, with
//! every kind of loss, and what was acknowledged must be there afterwards.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    task::Poll,
    time::Duration,
};

use futures::FutureExt;

use super::{recovery::WalOptions, *};
use crate::{
    sim_disk::{Loss, SimDisk},
    snapshot::SnapshotFiles,
    types::{Command, LeaderId, SnapshotData, SnapshotMeta},
};

const IDENTITY: Identity = Identity { cluster_id: [3; 16], node_id: 1 };
const LOSSES: [Loss; 4] = [Loss::Nothing, Loss::All, Loss::Prefix, Loss::Random];

fn directory() -> PathBuf {
    PathBuf::from("raft")
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(LeaderId { term, node_id: 1 }, index)
}

fn entry(term: u64, index: u64) -> LogEntry {
    let data = Arc::from(vec![term as u8; 200 + (index as usize * 37) % 300]);
    let command = Command { time_ms: index, id: [index as u8; 16], data };
    LogEntry { log_id: log_id(term, index), payload: Payload::Normal(command) }
}

/// One step of the scripted life.
#[derive(Debug, Clone)]
enum Step {
    Write(Vec<Record>),
    Committed(LogId),
    Snapshot(LogId),
}

/// Everything a log does, over several segments: votes, appends alone and together, a truncation
/// and other entries behind it, snapshots and purges.
fn script() -> Vec<Step> {
    let mut steps = vec![Step::Write(vec![Record::Vote(Vote::new(1, 1))])];
    let append = |steps: &mut Vec<Step>, term, indexes: std::ops::Range<u64>, together| {
        let records: Vec<Record> = indexes.map(|index| Record::Entry(entry(term, index))).collect();
        steps.extend(records.chunks(together).map(|chunk| Step::Write(chunk.to_vec())));
    };
    append(&mut steps, 1, 0..12, 1);
    steps.push(Step::Committed(log_id(1, 9)));
    steps.push(Step::Write(vec![Record::Vote(Vote::new(2, 3))]));
    append(&mut steps, 1, 12..21, 3);
    steps.push(Step::Write(vec![Record::Truncate(Some(log_id(1, 15)))]));
    append(&mut steps, 2, 16..26, 2);
    steps.push(Step::Snapshot(log_id(1, 14)));
    steps.push(Step::Write(vec![Record::Purge(log_id(1, 10))]));
    append(&mut steps, 2, 26..34, 2);
    steps.push(Step::Write(vec![Record::Vote(Vote::new_committed(3, 1))]));
    steps.push(Step::Snapshot(log_id(2, 30)));
    steps.push(Step::Write(vec![Record::Purge(log_id(2, 26))]));
    append(&mut steps, 2, 34..40, 3);
    steps
}

/// What must be there, and what may be there besides.
#[derive(Debug, Clone, Default, PartialEq)]
struct Expected {
    vote: Option<Vote>,
    purged: Option<LogId>,
    entries: BTreeMap<u64, LogEntry>,
    snapshot: Option<LogId>,
}

impl Expected {
    fn apply(&mut self, step: &Step) {
        match step {
            Step::Committed(_) => {}
            Step::Snapshot(log_id) => self.snapshot = Some(*log_id),
            Step::Write(records) => records.iter().for_each(|record| self.apply_record(record)),
        }
    }

    fn apply_record(&mut self, record: &Record) {
        match record {
            Record::Vote(vote) => self.vote = Some(*vote),
            Record::Entry(entry) => {
                self.entries.insert(entry.log_id.index, entry.clone());
            }
            Record::Truncate(after) => {
                self.entries.split_off(&after.map_or(0, |id| id.index + 1));
            }
            Record::Purge(log_id) => {
                self.entries = self.entries.split_off(&(log_id.index + 1));
                self.purged = Some(*log_id);
            }
            Record::Committed(_) => {}
        }
    }
}

/// How far a life came.
struct Life {
    /// The state after each step that was acknowledged, the empty one first.
    acknowledged: Expected,
    /// States that the step under way may have reached.
    possible: Vec<Expected>,
}

/// Opens, does the rest of the script, and stops where the disk does.
fn live(disk: &SimDisk, steps: &[Step], mut state: Expected) -> Result<Life, WalError> {
    let (wal, mut writer, files) = open(disk)?;
    let mut life = Life { acknowledged: state.clone(), possible: vec![state.clone()] };
    for step in steps {
        life.possible = vec![state.clone()];
        let mut partly = state.clone();
        if let Step::Write(records) = step {
            for record in records {
                partly.apply_record(record);
                life.possible.push(partly.clone());
            }
        }
        let done = match step {
            Step::Committed(log_id) => {
                wal.note_committed(*log_id);
                true
            }
            Step::Snapshot(log_id) => {
                let meta = SnapshotMeta { last_log_id: Some(*log_id), ..Default::default() };
                let data = SnapshotData {
                    time_ms: 1,
                    removed: Default::default(),
                    state: Arc::new(vec![7; 3_000]),
                };
                files.save(&meta, &data).is_ok()
            }
            Step::Write(records) => write(&wal, &mut writer, records),
        };
        state.apply(step);
        life.possible.push(state.clone());
        if !done {
            return Ok(life);
        }
        life.acknowledged = state.clone();
        life.possible = vec![state.clone()];
    }
    Ok(life)
}

type Task = futures::future::Fuse<futures::future::BoxFuture<'static, ()>>;

/// Returns at the second turn.
fn one_turn() -> impl Future<Output = ()> + Send + 'static {
    let mut waited = false;
    std::future::poll_fn(move |_| {
        if std::mem::replace(&mut waited, true) { Poll::Ready(()) } else { Poll::Pending }
    })
}

fn open(disk: &SimDisk) -> Result<(Wal, Task, SnapshotFiles<SimDisk>), WalError> {
    let (opened, files) = open_with(disk)?;
    let writer = opened.writer.run_as_task(|_: Duration| one_turn());
    Ok((opened.wal, writer.boxed().fuse(), files))
}

fn open_with(
    disk: &SimDisk,
) -> Result<(recovery::Opened<SimDisk>, SnapshotFiles<SimDisk>), WalError> {
    let options = WalOptions {
        directory: directory(),
        identity: IDENTITY,
        segment_bytes: 4_096,
        fresh_incarnation: [5; 16],
    };
    let opening = Opening::begin(disk.clone(), options)?;
    let other = |error: crate::SnapshotError| WalError::Io {
        act: "open",
        path: directory(),
        source: io::Error::other(error),
    };
    let files = SnapshotFiles::open(disk.clone(), directory().join("snapshots"), IDENTITY)
        .map_err(other)?;
    let newest = files.newest().map_err(other)?;
    let opened = opening.finish(newest.and_then(|snapshot| snapshot.meta.last_log_id))?;
    Ok((opened, files))
}

/// Submits records; the answer comes while the writer gets its turns.
fn submit(wal: &Wal, records: &[Record]) -> Arc<Mutex<Option<bool>>> {
    let answer = Arc::new(Mutex::new(None));
    let sender = answer.clone();
    let done: Done = Box::new(move |result| {
        *sender.lock().expect("one thread") = Some(result.is_ok());
    });
    wal.submit(records, Some(done));
    answer
}

/// Lets the writer go on for a while.
fn turns(writer: &mut Task, answer: &Mutex<Option<bool>>) -> Option<bool> {
    for _ in 0..32 {
        let _ = writer.now_or_never();
        if let Some(answer) = *answer.lock().expect("one thread") {
            return Some(answer);
        }
    }
    None
}

/// Submits records and drives the writer until it has answered.
fn write(wal: &Wal, writer: &mut Task, records: &[Record]) -> bool {
    turns(writer, &submit(wal, records)).expect("every writer is answered")
}

/// Everything acknowledged is there and nothing that was never written.
fn check(disk: &SimDisk, life: &Life, what: &str) -> Expected {
    let (opened, files) = open_with(disk).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(opened.healing, None, "{what}: a power cut is no damage");
    let recovered = &opened.recovered;
    let newest = files.newest().expect("read");
    let snapshot = newest.and_then(|snapshot| snapshot.meta.last_log_id);
    let found = Expected {
        vote: recovered.vote,
        purged: recovered.purged,
        entries: recovered.entries.clone(),
        snapshot,
    };
    assert!(
        life.possible.contains(&found),
        "{what}: found {found:?}\nacknowledged {:?}",
        life.acknowledged
    );
    if let Some(committed) = recovered.committed {
        assert_eq!(committed, log_id(1, 9), "{what}");
    }
    found
}

#[test]
fn a_power_cut_at_any_operation_keeps_what_was_acknowledged_and_adds_nothing() {
    let steps = script();
    let whole = SimDisk::new(0);
    live(&whole, &steps, Expected::default()).expect("nothing fails");
    let operations = whole.operations();
    let segments = whole.paths().iter().filter(|(path, _)| path.extension().is_some()).count();
    assert!(operations > 100 && segments > 2, "{operations} operations, {segments} segments");
    for at in 0..operations {
        for loss in LOSSES {
            let disk = SimDisk::new(at);
            disk.power_off_at(at);
            let life = live(&disk, &steps, Expected::default()).unwrap_or_else(|_| Life {
                acknowledged: Expected::default(),
                possible: vec![Expected::default()],
            });
            let what = format!("power cut at operation {at}, losing {loss:?}");
            let disk = disk.crash(loss);
            check(&disk.fork(at), &life, &what);
        }
    }
}

#[test]
fn a_power_cut_during_recovery_changes_nothing_about_what_is_recovered() {
    let steps = script();
    let whole = SimDisk::new(0);
    live(&whole, &steps, Expected::default()).expect("nothing fails");
    for at in (0..whole.operations()).step_by(7) {
        let disk = SimDisk::new(at);
        disk.power_off_at(at);
        let Ok(life) = live(&disk, &steps, Expected::default()) else {
            continue;
        };
        let disk = disk.crash(Loss::Random);
        let calm = disk.fork(at);
        let expected = check(&calm, &life, &format!("cut at {at}"));
        for again in 0..calm.operations() {
            for loss in LOSSES {
                let disk = disk.fork(again);
                disk.power_off_at(again);
                drop(open_with(&disk));
                let disk = disk.crash(loss);
                let what = format!("cut at {at}, and at {again} of the recovery, losing {loss:?}");
                assert_eq!(check(&disk, &life, &what), expected, "{what}");
            }
        }
    }
}

#[test]
fn the_log_goes_on_after_each_power_cut_as_if_nothing_had_been() {
    let steps = script();
    let whole = SimDisk::new(0);
    live(&whole, &steps, Expected::default()).expect("nothing fails");
    let more: Vec<Step> = (100..112)
        .map(|index| {
            Step::Write(vec![Record::Purge(log_id(9, index)), Record::Entry(entry(9, index + 1))])
        })
        .collect();
    for at in (0..whole.operations()).step_by(5) {
        let disk = SimDisk::new(at);
        disk.power_off_at(at);
        let Ok(life) = live(&disk, &steps, Expected::default()) else {
            continue;
        };
        let disk = disk.crash(Loss::Random);
        let found = check(&disk.fork(at), &life, "first");
        // The snapshot that the purges need.
        let mut state = found;
        let snapshot = Step::Snapshot(log_id(9, 111));
        let steps: Vec<Step> = std::iter::once(snapshot).chain(more.clone()).collect();
        let second = live(&disk, &steps, state.clone()).expect("no fault");
        steps.iter().for_each(|step| state.apply(step));
        assert_eq!(second.acknowledged, state);
        check(&disk.crash(Loss::All), &second, &format!("second life after a cut at {at}"));
    }
}

#[test]
fn an_interrupted_repair_of_a_damaged_log_is_taken_up_again() {
    let steps = script();
    let whole = SimDisk::new(0);
    live(&whole, &steps, Expected::default()).expect("nothing fails");
    let whole = whole.crash(Loss::Nothing);
    let segments: Vec<PathBuf> = whole
        .paths()
        .into_iter()
        .map(|(path, _)| path)
        .filter(|path| path.extension().is_some_and(|extension| extension == "wal"))
        .collect();
    for segment in &segments {
        let damaged = whole.fork(1);
        damaged.damage(segment, |bytes| bytes[300] ^= 1);
        let calm = damaged.fork(1);
        let (opened, _) = open_with(&calm).expect("it heals");
        let (expected, healing) = (opened.recovered.clone(), opened.healing.clone());
        assert!(healing.is_some(), "{}", segment.display());
        assert_eq!(expected.vote, Some(Vote::new_committed(3, 1)));
        drop(opened);
        for at in 0..calm.operations() {
            for loss in LOSSES {
                let disk = damaged.fork(at);
                disk.power_off_at(disk.operations() + at);
                let _ = open_with(&disk);
                let disk = disk.crash(loss);
                let what = format!("{} damaged, cut at {at}, {loss:?}", segment.display());
                let (opened, _) =
                    open_with(&disk).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(opened.recovered, expected, "{what}");
                assert!(opened.healing.is_some(), "{what}: the damage was forgotten");
            }
        }
    }
}

#[test]
fn a_failed_flush_stops_the_log_and_nothing_of_it_is_acknowledged() {
    let disk = SimDisk::new(1);
    let (wal, mut writer, _) = open(&disk).expect("open");
    assert!(write(&wal, &mut writer, &[Record::Entry(entry(1, 0))]));
    disk.fail_syncs(1);
    assert!(!write(&wal, &mut writer, &[Record::Entry(entry(1, 1))]));
    assert!(!write(&wal, &mut writer, &[Record::Entry(entry(1, 2))]), "it never goes on");
    assert!(wal.failure().borrow().is_some());
    drop(writer);
    let (opened, _) = open_with(&disk.crash(Loss::All)).expect("reopen");
    assert_eq!(opened.recovered.entries.len(), 1);
}

/// A log that finds no space for its next segment: entry `index` waits for it.
struct Full {
    disk: SimDisk,
    wal: Wal,
    writer: Task,
    index: u64,
    waiting: Arc<Mutex<Option<bool>>>,
}

fn full() -> Full {
    let disk = SimDisk::new(1);
    let (wal, mut writer, _) = open(&disk).expect("open");
    assert!(write(&wal, &mut writer, &[Record::Vote(Vote::new(1, 1))]));
    disk.set_capacity(Some(disk.used_bytes()));
    for index in 0..100 {
        let waiting = submit(&wal, &[Record::Entry(entry(1, index))]);
        if turns(&mut writer, &waiting).is_none() {
            assert!(wal.no_space().borrow().is_some());
            return Full { disk, wal, writer, index, waiting };
        }
    }
    panic!("the disk never was full");
}

#[test]
fn a_full_disk_still_takes_votes_and_forgets_none() {
    let Full { disk, wal, mut writer, index, waiting } = full();
    for term in 2..200 {
        assert!(write(&wal, &mut writer, &[Record::Vote(Vote::new(term, 2))]), "term {term}");
    }
    assert_eq!(*waiting.lock().expect("one thread"), None, "the entry still waits");
    drop((wal, writer));
    for loss in LOSSES {
        let (opened, _) = open_with(&disk.fork(1).crash(loss)).expect("reopen on the full disk");
        assert_eq!(opened.recovered.vote, Some(Vote::new(199, 2)), "{loss:?}");
        assert_eq!(opened.recovered.entries.len() as u64, index, "{loss:?}");
        assert_eq!(opened.healing, None);
    }
}

#[test]
fn a_log_that_waited_for_space_goes_on_when_there_is_some() {
    let Full { disk, wal, mut writer, index, waiting } = full();
    assert!(write(&wal, &mut writer, &[Record::Vote(Vote::new(2, 2))]));
    disk.set_capacity(None);
    assert_eq!(turns(&mut writer, &waiting), Some(true));
    assert!(wal.no_space().borrow().is_none());
    assert!(write(&wal, &mut writer, &[Record::Entry(entry(1, index + 1))]));
    assert!(wal.failure().borrow().is_none());
    drop((wal, writer));
    let (opened, _) = open_with(&disk.crash(Loss::All)).expect("reopen");
    assert_eq!(opened.recovered.entries.len() as u64, index + 2);
    assert_eq!(opened.recovered.vote, Some(Vote::new(2, 2)));
}

#[test]
fn a_purge_on_a_full_disk_makes_the_space_that_entries_wait_for() {
    let Full { disk, wal, mut writer, index, waiting } = full();
    let disk_used = disk.used_bytes();
    // Room for one more segment, so that an older one is there to go.
    disk.set_capacity(Some(disk_used + 4_096));
    assert_eq!(turns(&mut writer, &waiting), Some(true));
    let mut last = index;
    let waiting = loop {
        last += 1;
        let waiting = submit(&wal, &[Record::Entry(entry(1, last))]);
        if turns(&mut writer, &waiting).is_none() {
            break waiting;
        }
    };
    assert!(write(&wal, &mut writer, &[Record::Purge(log_id(1, index - 1))]));
    assert_eq!(turns(&mut writer, &waiting), Some(true));
    drop((wal, writer));
    disk.set_capacity(None);
    let files = SnapshotFiles::open(disk.clone(), directory().join("snapshots"), IDENTITY);
    let meta = SnapshotMeta { last_log_id: Some(log_id(1, index - 1)), ..Default::default() };
    let data = SnapshotData { time_ms: 1, removed: Default::default(), state: Arc::default() };
    files.expect("open").save(&meta, &data).expect("save");
    let (opened, _) = open_with(&disk.crash(Loss::Nothing)).expect("reopen");
    assert_eq!(opened.healing, None);
    let kept: Vec<u64> = opened.recovered.entries.keys().copied().collect();
    assert_eq!(kept, (index..=last).collect::<Vec<_>>());
}
