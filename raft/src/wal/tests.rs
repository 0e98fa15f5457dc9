//! The log through real files.

use std::{fs, path::Path, sync::mpsc};

use tempfile::TempDir;

use super::{frame::decode_frame, segment::SEGMENT_HEADER_BYTES, *};
use crate::{disk::HostDisk, types::LeaderId};

const SEGMENT: u64 = 4_096;
const IDENTITY: Identity = Identity { cluster_id: [3; 16], node_id: 1 };

fn options(directory: &Path) -> WalOptions {
    WalOptions {
        directory: directory.to_owned(),
        identity: IDENTITY,
        segment_bytes: SEGMENT,
        fresh_incarnation: [5; 16],
    }
}

/// Opens with a snapshot that goes as far as the log was purged.
fn open_healing(directory: &Path) -> Result<(Wal, Recovered, Option<String>), WalError> {
    let opening = Opening::begin(HostDisk, options(directory))?;
    let purged = opening.scan().recovered.purged;
    let opened = opening.finish(purged)?;
    opened.wal.start_thread(opened.writer)?;
    Ok((opened.wal, opened.recovered, opened.healing))
}

fn open(directory: &Path) -> Result<(Wal, Recovered), WalError> {
    let (wal, recovered, healing) = open_healing(directory)?;
    assert_eq!(healing, None);
    Ok((wal, recovered))
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
    segment::list(&HostDisk, directory).expect("list").into_iter().map(|(_, path)| path).collect()
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

/// Takes the mark of acknowledged frames back, as if its write-back had not happened.
fn forget_mark(directory: &Path) {
    let path = directory.join("state");
    let mut bytes = fs::read(&path).expect("read");
    bytes[12_288..12_300].fill(0);
    fs::write(&path, bytes).expect("write");
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
        forget_mark(directory.path());
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
    // The sector in which the frame begins was not written, or its part of it.
    bytes[last..last.next_multiple_of(512)].fill(0);
    fs::write(&path, bytes).expect("tear");
    forget_mark(directory.path());
    let (_wal, recovered) = open(directory.path()).expect("reopen");
    assert_eq!(recovered.entries.len(), 2);
}

/// Copies a directory's files, so that each case of damage starts from the same.
fn copy_of(directory: &Path) -> TempDir {
    let copy = self::directory();
    for item in fs::read_dir(directory).expect("list") {
        let path = item.expect("item").path();
        fs::copy(&path, copy.path().join(path.file_name().expect("name"))).expect("copy");
    }
    copy
}

/// Opens a damaged log twice: what it keeps, that it says what is wrong, and that it stays so.
fn healing_after(directory: &Path, what: &str) -> (Recovered, String) {
    let opened = open_healing(directory);
    let (wal, recovered, healing) = opened.unwrap_or_else(|error| panic!("{what}: {error}"));
    let healing = healing.unwrap_or_else(|| panic!("{what}: the damage went unseen"));
    drop(wal);
    let (wal, again, still) = open_healing(directory).expect("reopen");
    assert_eq!(again, recovered, "{what}");
    assert_eq!(still.as_ref(), Some(&healing), "{what}");
    drop(wal);
    (recovered, healing)
}

#[test]
fn any_flipped_bit_of_an_acknowledged_frame_is_damage_that_keeps_what_lies_before_it() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write(&wal, &[Record::Vote(Vote::new_committed(4, 1))]);
    write_entries(&wal, 0..60);
    drop(wal);
    let paths = segments(directory.path());
    for path in [&paths[0], &paths[1], &paths[paths.len() - 1]] {
        let offsets = frame_offsets(path);
        for frame in [0, offsets.len() / 2, offsets.len() - 2] {
            for at in [0, 5, 9, 40] {
                let copy = copy_of(directory.path());
                let damaged = copy.path().join(path.file_name().expect("name"));
                let mut bytes = fs::read(&damaged).expect("read");
                bytes[offsets[frame] + at] ^= 4;
                fs::write(&damaged, bytes).expect("damage");
                let what = format!("byte {at} of frame {frame} in {}", path.display());
                let (recovered, healing) = healing_after(copy.path(), &what);
                assert_eq!(recovered.vote, Some(Vote::new_committed(4, 1)), "{what}");
                let kept = recovered.entries.len() as u64;
                assert!(kept < 60, "{what}");
                let expected = (0..kept).map(|index| (index, entry(index))).collect();
                assert_eq!(recovered.entries, expected, "{what}");
                assert!(healing.contains("is damaged at byte"), "{healing}");
            }
        }
    }
}

#[test]
fn a_flipped_bit_of_the_last_frame_is_damage_even_when_the_mark_was_never_written_back() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write_entries(&wal, 0..5);
    drop(wal);
    forget_mark(directory.path());
    let path = segments(directory.path()).remove(0);
    let offsets = frame_offsets(&path);
    for at in (offsets[4]..offsets[5]).step_by(3) {
        let copy = copy_of(directory.path());
        let damaged = copy.path().join(path.file_name().expect("name"));
        let mut bytes = fs::read(&damaged).expect("read");
        bytes[at] ^= 2;
        fs::write(&damaged, bytes).expect("damage");
        let (recovered, _) = healing_after(copy.path(), &format!("byte {at}"));
        assert_eq!(recovered.entries.len(), 4);
    }
}

#[test]
fn a_missing_or_truncated_segment_is_damage_wherever_it_is() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write(&wal, &[Record::Vote(Vote::new(4, 1))]);
    write_entries(&wal, 0..60);
    drop(wal);
    for path in segments(directory.path()) {
        for length in [None, Some(0), Some(30), Some(200)] {
            let copy = copy_of(directory.path());
            let damaged = copy.path().join(path.file_name().expect("name"));
            match length {
                None => fs::remove_file(&damaged).expect("remove"),
                Some(length) => {
                    let bytes = fs::read(&damaged).expect("read");
                    fs::write(&damaged, &bytes[..length]).expect("truncate");
                }
            }
            let what = format!("{} cut to {length:?}", path.display());
            let (recovered, _) = healing_after(copy.path(), &what);
            assert_eq!(recovered.vote, Some(Vote::new(4, 1)), "{what}");
            assert!(recovered.entries.len() < 60, "{what}");
        }
    }
}

#[test]
fn a_healing_log_writes_on_and_says_so_until_it_is_healed() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write_entries(&wal, 0..60);
    drop(wal);
    fs::remove_file(&segments(directory.path())[1]).expect("remove");
    let (wal, recovered, healing) = open_healing(directory.path()).expect("open");
    assert!(healing.is_some());
    write_entries(&wal, recovered.entries.len() as u64..80);
    drop(wal);
    let (wal, recovered, healing) = open_healing(directory.path()).expect("open");
    assert_eq!(recovered.entries, (0..80).map(|index| (index, entry(index))).collect());
    assert!(healing.is_some(), "nobody has said that it is healed");
    drop(wal);
    recovery::note_healed(&HostDisk, directory.path()).expect("healed");
    assert_eq!(open(directory.path()).expect("open").1.entries.len(), 80);
}

#[test]
fn a_log_that_lost_its_end_and_every_copy_of_its_vote_is_refused() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write(&wal, &[Record::Vote(Vote::new(4, 1))]);
    write_entries(&wal, 0..60);
    drop(wal);
    let state = directory.path().join("state");
    let whole = fs::read(&state).expect("read");
    let mut bytes = whole.clone();
    bytes[4_100] ^= 1;
    bytes[8_200] ^= 1;
    fs::write(&state, &bytes).expect("damage");
    // The log alone still knows the vote.
    let (wal, recovered) = open(directory.path()).expect("open");
    assert_eq!(recovered.vote, Some(Vote::new(4, 1)));
    drop(wal);

    fs::write(&state, &bytes).expect("damage");
    fs::remove_file(&segments(directory.path())[2]).expect("remove");
    let refused = open_healing(directory.path()).err().expect("refused").to_string();
    assert!(refused.contains("trine cluster replace"), "{refused}");
    // With one slot readable it heals.
    bytes[4_100] ^= 1;
    fs::write(&state, &bytes).expect("repair one");
    let (recovered, _) = healing_after(directory.path(), "one slot");
    assert_eq!(recovered.vote, Some(Vote::new(4, 1)));
}

#[test]
fn a_log_whose_snapshot_is_gone_begins_afresh_behind_the_one_that_is_left() {
    let directory = directory();
    let (wal, _) = open(directory.path()).expect("open");
    write(&wal, &[Record::Vote(Vote::new(4, 1))]);
    write_entries(&wal, 0..30);
    write(&wal, &[Record::Purge(log_id(20))]);
    drop(wal);
    for left in [Some(log_id(7)), None] {
        let copy = copy_of(directory.path());
        let opening = Opening::begin(HostDisk, options(copy.path())).expect("begin");
        let opened = opening.finish(left).expect("finish");
        assert_eq!(opened.recovered.purged, left);
        assert!(opened.recovered.entries.is_empty() && opened.healing.is_some());
        drop((opened.wal, opened.writer));
        let opening = Opening::begin(HostDisk, options(copy.path())).expect("begin again");
        let opened = opening.finish(left).expect("finish");
        assert_eq!(opened.recovered.vote, Some(Vote::new(4, 1)));
        assert_eq!(opened.recovered.purged, left);
    }
}

#[test]
fn the_incarnation_is_kept_as_long_as_any_file_knows_it() {
    let directory = directory();
    drop(open(directory.path()).expect("open"));
    let incarnation = || {
        let mut options = options(directory.path());
        options.fresh_incarnation = [6; 16];
        let opened = Opening::begin(HostDisk, options).expect("begin").finish(None);
        opened.expect("finish").incarnation
    };
    assert_eq!(incarnation(), [5; 16]);
    fs::remove_file(directory.path().join("state")).expect("remove");
    assert_eq!(incarnation(), [5; 16]);
}

#[test]
fn another_nodes_or_clusters_log_is_refused() {
    let directory = directory();
    drop(open(directory.path()).expect("open"));
    for identity in
        [Identity { node_id: 2, ..IDENTITY }, Identity { cluster_id: [4; 16], ..IDENTITY }]
    {
        let options = WalOptions { identity, ..options(directory.path()) };
        let refused = Opening::begin(HostDisk, options).err();
        assert!(matches!(refused, Some(WalError::WrongIdentity { .. })));
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
