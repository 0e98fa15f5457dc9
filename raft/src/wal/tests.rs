//! The log through real files.

use std::{fs, path::Path, sync::mpsc};

use tempfile::TempDir;

use super::*;
use crate::types::{LeaderId, Payload};

const SEGMENT: u64 = 4_096;
const IDENTITY: Identity = Identity { cluster_id: [3; 16], node_id: 1 };

fn open(directory: &Path) -> Result<(Wal, Recovered), WalError> {
    Wal::open(WalOptions {
        directory: directory.to_owned(),
        identity: IDENTITY,
        segment_bytes: SEGMENT,
    })
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("temporary directory")
}

fn log_id(index: u64) -> LogId {
    LogId::new(LeaderId { term: 1, node_id: 1 }, index)
}

fn entry(index: u64) -> LogEntry {
    let command = crate::types::Command {
        time_ms: index,
        id: [index as u8; 16],
        data: Arc::from(vec![index as u8; 100]),
    };
    LogEntry { log_id: log_id(index), payload: Payload::Normal(command) }
}

/// Submits records and waits until they are durable.
fn write(wal: &Wal, records: &[Record]) {
    let (sender, receiver) = mpsc::channel();
    wal.submit(records, Some(Box::new(move |result| sender.send(result).expect("waiting"))));
    receiver.recv().expect("called").expect("durable");
}

fn write_entries(wal: &Wal, range: std::ops::Range<u64>) {
    for index in range {
        write(wal, &[Record::Entry(entry(index))]);
    }
}

fn segments(directory: &Path) -> Vec<PathBuf> {
    segment::list(directory).expect("list").into_iter().map(|(_, path)| path).collect()
}

/// Where the frames of a segment begin, and where the last ends.
fn frame_offsets(path: &Path) -> Vec<usize> {
    let bytes = fs::read(path).expect("read");
    let mut offsets = vec![SEGMENT_HEADER_BYTES];
    while let Some(frame) = decode_frame(&bytes[offsets[offsets.len() - 1]..]) {
        offsets.push(offsets[offsets.len() - 1] + frame.size_bytes);
    }
    offsets
}

#[test]
fn everything_acknowledged_is_there_after_reopening() {
    let directory = directory();
    let (wal, recovered) = open(directory.path()).expect("open");
    assert_eq!(recovered, Recovered::default());
    write(&wal, &[Record::Vote(Vote::new(2, 1))]);
    write_entries(&wal, 0..100);
    wal.note_committed(log_id(98));
    write(&wal, &[Record::Vote(Vote::new_committed(3, 1))]);
    drop(wal);
    assert!(segments(directory.path()).len() > 1, "the test must cross segments");

    let (_wal, recovered) = open(directory.path()).expect("reopen");
    assert_eq!(recovered.vote, Some(Vote::new_committed(3, 1)));
    assert_eq!(recovered.committed, Some(log_id(98)));
    assert_eq!(recovered.entries, (0..100).map(|index| (index, entry(index))).collect());
}

#[test]
fn a_commit_noted_last_is_written_when_the_log_closes() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write_entries(&wal, 0..2);
    wal.note_committed(log_id(1));
    drop(wal);
    let (_wal, recovered) = open(directory.path()).expect("reopen");
    assert_eq!(recovered.committed, Some(log_id(1)));
}

#[test]
fn truncation_and_later_entries_come_back_in_order() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write_entries(&wal, 0..10);
    wal.submit(&[Record::Truncate(Some(log_id(4)))], None);
    write_entries(&wal, 5..7);
    drop(wal);
    let (wal, recovered) = open(directory.path()).expect("reopen");
    assert_eq!(recovered.entries.len(), 7);
    write(&wal, &[Record::Truncate(None)]);
    drop(wal);
    let (_wal, recovered) = open(directory.path()).expect("reopen");
    assert!(recovered.entries.is_empty());
}

#[test]
fn purging_removes_whole_segments_and_keeps_vote_and_commit() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write(&wal, &[Record::Vote(Vote::new(9, 1))]);
    write_entries(&wal, 0..200);
    wal.note_committed(log_id(199));
    let before = segments(directory.path()).len();
    write(&wal, &[Record::Purge(log_id(190))]);
    write_entries(&wal, 200..240);
    write(&wal, &[Record::Purge(log_id(200))]);
    drop(wal);
    let after = segments(directory.path());
    assert!(after.len() < before, "{} of {before} segments are left", after.len());
    assert!(!after[0].ends_with(format!("{:016x}.wal", 1)));

    let (_wal, recovered) = open(directory.path()).expect("reopen");
    assert_eq!(recovered.vote, Some(Vote::new(9, 1)));
    assert_eq!(recovered.committed, Some(log_id(199)));
    assert_eq!(recovered.purged, Some(log_id(200)));
    assert_eq!(
        recovered.entries.keys().copied().collect::<Vec<_>>(),
        (201..240).collect::<Vec<_>>()
    );
}

#[test]
fn a_purge_past_the_end_leaves_an_empty_log_that_goes_on_behind_it() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write_entries(&wal, 0..3);
    write(&wal, &[Record::Purge(log_id(50))]);
    write_entries(&wal, 51..53);
    drop(wal);
    let (_wal, recovered) = open(directory.path()).expect("reopen");
    assert_eq!(recovered.purged, Some(log_id(50)));
    assert_eq!(recovered.entries.len(), 2);
}

#[test]
fn every_torn_tail_is_cut_off_and_the_log_goes_on() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write_entries(&wal, 0..3);
    drop(wal);
    let path = segments(directory.path()).remove(0);
    let whole = fs::read(&path).expect("read");
    let offsets = frame_offsets(&path);
    let (last, end) = (offsets[2], offsets[3]);
    for kept in (last + 1..end).step_by(7) {
        let mut torn = whole.clone();
        torn[kept..end].fill(0);
        fs::write(&path, &torn).expect("tear");
        let (wal, recovered) = open(directory.path()).expect("a torn tail is no error");
        assert_eq!(recovered.entries.len(), 2, "torn at {kept}");
        write_entries(&wal, 2..3);
        drop(wal);
        let (wal, recovered) = open(directory.path()).expect("reopen");
        assert_eq!(recovered.entries.len(), 3);
        drop(wal);
    }
}

#[test]
fn a_tear_that_lost_the_first_bytes_of_the_last_frame_is_cut_off_too() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write_entries(&wal, 0..3);
    drop(wal);
    let path = segments(directory.path()).remove(0);
    let mut bytes = fs::read(&path).expect("read");
    let last = frame_offsets(&path)[2];
    bytes[last..last + 20].fill(0);
    fs::write(&path, bytes).expect("tear");
    let (_wal, recovered) = open(directory.path()).expect("reopen");
    assert_eq!(recovered.entries.len(), 2);
}

#[test]
fn a_flipped_bit_before_the_last_frame_is_corruption_that_names_file_and_offset() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write_entries(&wal, 0..100);
    drop(wal);
    let paths = segments(directory.path());
    for path in [&paths[0], &paths[paths.len() - 1]] {
        let whole = fs::read(path).expect("read");
        let offsets = frame_offsets(path);
        let frame = offsets[offsets.len() - 3];
        for at in [frame, frame + 5, frame + 40] {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            fs::write(path, &damaged).expect("damage");
            match open(directory.path()).err() {
                Some(WalError::Corrupt { path: named, offset, .. }) => {
                    assert_eq!(&named, path);
                    assert_eq!(offset, frame as u64);
                }
                other => panic!("expected corruption at {at}, got {other:?}"),
            }
        }
        fs::write(path, &whole).expect("repair");
    }
    open(directory.path()).expect("repaired");
}

#[test]
fn a_missing_segment_is_corruption() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write_entries(&wal, 0..100);
    drop(wal);
    fs::remove_file(&segments(directory.path())[1]).expect("remove");
    assert!(matches!(open(directory.path()), Err(WalError::Corrupt { .. })));
}

#[test]
fn another_nodes_or_clusters_log_is_refused() {
    let directory = directory();
    drop(open(directory.path()).expect("open"));
    for identity in
        [Identity { node_id: 2, ..IDENTITY }, Identity { cluster_id: [4; 16], ..IDENTITY }]
    {
        let options =
            WalOptions { directory: directory.path().to_owned(), identity, segment_bytes: SEGMENT };
        assert!(matches!(Wal::open(options), Err(WalError::WrongIdentity { .. })));
    }
}

#[test]
fn a_directory_in_use_is_refused_until_it_is_given_back() {
    let directory = directory();
    let first = open(directory.path()).expect("open");
    assert!(matches!(open(directory.path()), Err(WalError::Locked { .. })));
    drop(first);
    open(directory.path()).expect("free again");
}

#[test]
fn many_waiting_records_share_a_flush_and_an_oversized_one_gets_a_segment_of_its_own() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    let mut large = entry(0);
    if let Payload::Normal(command) = &mut large.payload {
        command.data = Arc::from(vec![7; 3 * SEGMENT as usize]);
    }
    let records: Vec<Record> =
        std::iter::once(large.clone()).chain((1..300).map(entry)).map(Record::Entry).collect();
    write(&wal, &records);
    drop(wal);
    let (_wal, recovered) = open(directory.path()).expect("reopen");
    assert_eq!(recovered.entries.len(), 300);
    assert_eq!(recovered.entries[&0], large);
}

#[test]
fn a_failed_write_stops_the_log_for_good() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write_entries(&wal, 0..1);
    // With the directory gone no further segment can be made.
    fs::remove_dir_all(directory.path()).expect("remove");
    let (sender, receiver) = mpsc::channel();
    for index in 1..100 {
        let sender = sender.clone();
        let done: Done = Box::new(move |result| sender.send(result.is_ok()).expect("waiting"));
        wal.submit(&[Record::Entry(entry(index))], Some(done));
    }
    drop(sender);
    let results: Vec<bool> = receiver.iter().collect();
    assert_eq!(results.len(), 99, "every caller is answered");
    assert_eq!(results.last(), Some(&false));
    let reason = wal.failure().borrow().clone();
    assert!(reason.expect("a reason").contains("can't write the log"));
}
