//! The random number device and the balloon as a driver sees them.

mod rig;

use rig::{DEADLINE, Driver, MEMORY_MIB, Rig, rig, until};
use std::time::Duration;
use vmm::config::{BalloonConfig, RngConfig};
use vmm::devices::balloon::link::BalloonLink;
use vmm::devices::rng::REQUEST_BYTES_MAX;
use vmm::devices::{balloon, rng};
use vmm::pci::PlugError;

const PAGE: u64 = 4096;
const DATA: u64 = 0x80_0000;
// Features and queues of the balloon.
const STATISTICS: u32 = 1 << 1;
const REPORTING: u32 = 1 << 5;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;

fn rng_rig(bytes_per_second: u64) -> Option<Rig> {
    rig(vec![rng::open(&RngConfig { bytes_per_second })])
}

#[test]
fn random_bytes_fill_what_the_driver_offers() {
    let Some(rig) = rng_rig(1 << 30) else { return };
    let mut driver = Driver::start(&rig, 1, 1, 0);
    driver.write(DATA, &[0; 3000]);
    driver.offer(0, &[(DATA, 1000, true), (DATA + 2000, 500, true)]);
    assert_eq!(driver.finish(0).1, 1500);
    let (first, second) = (driver.read(DATA, 1000), driver.read(DATA + 2000, 500));
    for bytes in [&first[..500], &first[500..], &second] {
        // 500 random bytes have about 220 different values.
        let different: std::collections::BTreeSet<_> = bytes.iter().collect();
        assert!(different.len() > 150, "{bytes:?}");
    }
    assert_ne!(first[..500], second);
    assert_eq!(driver.read(DATA + 1000, 1000), [0; 1000]);
}

#[test]
fn a_request_is_filled_up_to_the_limit_and_nonsense_gets_nothing() {
    let Some(rig) = rng_rig(1 << 30) else { return };
    let mut driver = Driver::start(&rig, 1, 1, 0);
    driver.offer(0, &[(DATA, 1 << 20, true)]);
    assert_eq!(driver.finish(0).1 as usize, REQUEST_BYTES_MAX);
    for bad in [(DATA, 100, false), (1 << 40, 100, true)] {
        driver.offer(0, &[bad]);
        assert_eq!(driver.finish(0).1, 0);
    }
    driver.offer(0, &[(DATA, 10, true)]);
    assert_eq!(driver.finish(0).1, 10);
    driver.lie(0, 1000);
    until("the device to ask for a reset", || driver.status() & 0x40 != 0);
    driver.set_up(1, 0);
    driver.offer(0, &[(DATA, 10, true)]);
    assert_eq!(driver.finish(0).1, 10);
}

#[test]
fn a_greedy_guest_gets_its_budget_and_no_more() {
    let Some(rig) = rng_rig(1000) else { return };
    let mut driver = Driver::start(&rig, 1, 1, 0);
    let start = std::time::Instant::now();
    let mut given = 0;
    while given < 1500 {
        driver.offer(0, &[(DATA, 60_000, true)]);
        let (_, len) = driver.finish(0);
        assert!((1..=1000).contains(&len), "{len}");
        given += u64::from(len);
    }
    // A full bucket, and what came in since; never more, however slow this machine is.
    let most = 1000 + start.elapsed().as_micros() as u64 / 1000 + 1;
    assert!(given <= most, "{given} bytes; at most {most}");
    // A driver that resets it while a request waits gets it back at once.
    driver.offer(0, &[(DATA, 60_000, true)]);
    driver.set_up(1, 0);
    driver.offer(0, &[(DATA, 1, true)]);
    assert_eq!(driver.finish(0).1, 1);
}

fn balloon_rig(target_mib: u32) -> Option<Rig> {
    let config = BalloonConfig { target_mib, deflate_on_oom: true, free_page_reporting: true };
    rig(vec![balloon::open(&config).unwrap()])
}

fn link(rig: &Rig) -> std::sync::Arc<BalloonLink> {
    rig.bus.balloon().unwrap()
}

fn inflate(driver: &mut Driver<'_>, numbers: &[u32]) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    driver.write(0x70_0000, &bytes);
    driver.offer(INFLATE, &[(0x70_0000, bytes.len() as u32, false)]);
    assert_eq!(driver.finish(INFLATE).1, 0);
}

fn page(address: u64) -> u32 {
    (address / PAGE) as u32
}

#[test]
fn inflated_pages_go_back_to_the_host_and_others_stay() {
    let Some(rig) = balloon_rig(4) else { return };
    let mut driver = Driver::start(&rig, 1, 3, STATISTICS);
    assert_eq!(driver.field(0), 4 << 8);
    driver.write(DATA, &[7; 8 * PAGE as usize]);
    inflate(&mut driver, &[page(DATA) + 1, page(DATA) + 2, page(DATA) + 5]);
    for (index, bytes) in driver.read(DATA, 8 * PAGE as usize).chunks(PAGE as usize).enumerate() {
        let gone = [1, 2, 5].contains(&index);
        assert!(bytes.iter().all(|byte| *byte == if gone { 0 } else { 7 }), "page {index}");
    }
    assert_eq!((link(&rig).given_back_bytes(), link(&rig).refusals()), (3 * PAGE, 0));
    // The guest says how large it is, and takes a page back by touching it.
    driver.set_field(4, 1 << 8);
    driver.set_field(0, 99);
    assert_eq!((link(&rig).size_mib(), link(&rig).target_mib()), (1, 4));
    driver.offer(DEFLATE, &[(0x70_0000, 4, false)]);
    assert_eq!(driver.finish(DEFLATE).1, 0);
    driver.write(DATA + PAGE, &[9; 10]);
    assert_eq!(driver.read(DATA + PAGE, 10), [9; 10]);
    // Another driver starts from nothing.
    driver.set_up(3, STATISTICS);
    assert_eq!((link(&rig).size_mib(), driver.field(0)), (0, 4 << 8));
}

#[test]
fn pages_that_the_guest_does_not_have_are_counted_and_left_alone() {
    let Some(rig) = balloon_rig(0) else { return };
    let mut driver = Driver::start(&rig, 1, 2, 0);
    let end = MEMORY_MIB << 8;
    driver.write(DATA, &[7; 4096]);
    // The last page of RAM and the first one behind it are together, and come apart here.
    inflate(&mut driver, &[end - 1, end, end + 1, u32::MAX, 1 << 31, page(DATA)]);
    assert_eq!((link(&rig).given_back_bytes(), link(&rig).refusals()), (2 * PAGE, 4));
    assert_eq!(driver.read(DATA, 4096), [0; 4096]);
    // A list that is too short for a number, one that lies nowhere, and one that is too long.
    driver.offer(INFLATE, &[(0x70_0000, 3, false)]);
    driver.finish(INFLATE);
    driver.offer(INFLATE, &[(1 << 40, 4, false)]);
    driver.finish(INFLATE);
    assert_eq!(link(&rig).refusals(), 5);
    let long = balloon::NUMBERS_MAX as u32 + 8;
    driver.write(DATA, &vec![0xFF; long as usize * 4]);
    driver.offer(INFLATE, &[(DATA, long * 4, false)]);
    driver.finish(INFLATE);
    assert_eq!(link(&rig).refusals(), 5 + u64::from(long));
    assert_eq!(driver.status(), 15);
}

#[test]
fn reported_free_memory_is_taken_in_whole_pages() {
    let Some(rig) = balloon_rig(0) else { return };
    // Without statistics the queue of reports is the third one, with them it is the fourth.
    for (queues, features) in [(3, REPORTING), (4, REPORTING | STATISTICS)] {
        let mut driver = Driver::start(&rig, 1, queues, features);
        driver.write(DATA, &[7; 6 * PAGE as usize]);
        driver.offer(
            queues - 1,
            &[(DATA + 10, 3 * PAGE as u32, true), (DATA + 4 * PAGE, PAGE as u32, true)],
        );
        driver.finish(queues - 1);
        for (index, bytes) in driver.read(DATA, 6 * PAGE as usize).chunks(PAGE as usize).enumerate()
        {
            let gone = [1, 2, 4].contains(&index);
            assert!(bytes.iter().all(|byte| *byte == if gone { 0 } else { 7 }), "page {index}");
        }
    }
    assert_eq!((link(&rig).given_back_bytes(), link(&rig).refusals()), (6 * PAGE, 0));
}

fn figures(free: u64) -> Vec<u8> {
    [(4u16, free), (5, 16 << 20)]
        .iter()
        .flat_map(|(tag, value)| tag.to_le_bytes().into_iter().chain(value.to_le_bytes()))
        .collect()
}

#[test]
fn statistics_are_asked_for_and_answered() {
    let Some(rig) = balloon_rig(0) else { return };
    const QUEUE: usize = 2;
    let mut driver = Driver::start(&rig, 1, 3, STATISTICS);
    let link = link(&rig);
    driver.write(DATA, &figures(1));
    driver.offer(QUEUE, &[(DATA, 20, false)]);
    until("the first figures", || {
        link.statistics(Duration::ZERO).and_then(|all| all.free_bytes) == Some(1)
    });
    let asking = std::thread::spawn({
        let link = std::sync::Arc::clone(&link);
        move || link.statistics(DEADLINE)
    });
    // The buffer comes back: that is the question. Whoever asked just now may have had it back.
    driver.finish(QUEUE);
    driver.write(DATA, &figures(2));
    while !asking.is_finished() {
        driver.offer(QUEUE, &[(DATA, 20, false)]);
        until("a question or an answer", || driver.used(QUEUE).is_some() || asking.is_finished());
    }
    let answer = asking.join().unwrap().unwrap();
    assert_eq!((answer.free_bytes, answer.total_bytes), (Some(2), Some(16 << 20)));
    assert_eq!(answer.swapped_in_bytes, None);
    // A guest that keeps silent, and one that has gone.
    assert_eq!(link.statistics(Duration::from_millis(1)), Some(answer));
    driver.set_up(2, 0);
    assert_eq!(link.statistics(Duration::from_millis(1)), None);
}

#[test]
fn a_new_target_is_told_as_a_change_of_the_configuration() {
    let Some(rig) = balloon_rig(0) else { return };
    let driver = Driver::start(&rig, 1, 2, 0);
    let before = driver.generation();
    rig.bus.set_balloon(3).unwrap();
    assert_eq!(driver.field(0), 3 << 8);
    assert_ne!(driver.generation(), before);
    let Some(other) = rng_rig(1) else { return };
    assert!(matches!(other.bus.set_balloon(1), Err(PlugError::NotFound(..))));
}

#[test]
fn a_balloon_whose_driver_lies_asks_for_a_reset() {
    let Some(rig) = balloon_rig(0) else { return };
    let mut driver = Driver::start(&rig, 1, 4, STATISTICS | REPORTING);
    for queue in [0, 1, 2, 3] {
        driver.lie(queue, 1000);
        until("the device to ask for a reset", || driver.status() & 0x40 != 0);
        driver.set_up(4, STATISTICS | REPORTING);
    }
    driver.write(DATA, &[7; 4096]);
    inflate(&mut driver, &[page(DATA)]);
    assert_eq!(driver.read(DATA, 1), [0]);
}
