//! The network between the hosts, in this process: an Ethernet segment that can be cut, cut one way,
//! lose, delay and duplicate frames, each from one host to another.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::event::{PollFd, PollFlags, poll};

use super::{HOSTS, tap};
use crate::random::Random;

/// Name of the device in each host.
pub(super) const DEVICE: &str = "wire0";
/// Frames that wait for their time; more are lost, as in a switch whose buffer is full.
const WAITING_MAX: usize = 10_000;
const FRAME_BYTES_MAX: usize = 65_536;
/// How soon the wire notices that it shall end.
const TICK: Duration = Duration::from_millis(50);

/// What happens to frames from one host to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    /// Nothing passes.
    pub(super) cut: bool,
    /// This share is lost.
    pub(super) loss_percent: u64,
    /// This share comes twice.
    pub(super) duplicate_percent: u64,
    /// Each frame is late by a random time up to this: a later one may overtake it.
    pub(super) delay_ms_max: u64,
}

/// All links, by sender and receiver (0 to 2).
type Links = [[Link; HOSTS]; HOSTS];

/// The wire; it ends with the value.
pub(super) struct Wire {
    links: Arc<Mutex<Links>>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Wire {
    /// Makes a device in the namespace of each process and joins them.
    pub(super) fn join(processes: [i32; HOSTS], seed: u64) -> Result<Wire> {
        let mut devices = Vec::new();
        for process in processes {
            devices.push(tap::make(process, DEVICE)?);
        }
        let links = Arc::new(Mutex::new(Links::default()));
        let ending = Arc::new(AtomicBool::new(false));
        let forwarder = Forwarder {
            devices,
            links: Arc::clone(&links),
            random: Random::new(seed),
            homes: HashMap::new(),
            waiting: BinaryHeap::new(),
            sent: 0,
        };
        let until = Arc::clone(&ending);
        let thread = std::thread::Builder::new().name("wire".into());
        let thread = Some(thread.spawn(move || forwarder.run(&until))?);
        Ok(Wire { links, ending, thread })
    }

    /// Changes the link from one host to another (0 to 2).
    pub(super) fn change(&self, from: usize, to: usize, change: impl FnOnce(&mut Link)) {
        change(&mut lock(&self.links)[from][to]);
    }

    /// Makes every link whole.
    pub(super) fn heal(&self) {
        *lock(&self.links) = Links::default();
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(links: &Mutex<Links>) -> MutexGuard<'_, Links> {
    links.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A frame on its way; ordered by time, then by turn.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    due: Instant,
    turn: u64,
    to: usize,
    frame: Vec<u8>,
}

struct Forwarder {
    devices: Vec<File>,
    links: Arc<Mutex<Links>>,
    random: Random,
    /// Which host a station was last heard from.
    homes: HashMap<[u8; 6], usize>,
    waiting: BinaryHeap<Reverse<Waiting>>,
    sent: u64,
}

impl Forwarder {
    fn run(mut self, ending: &AtomicBool) {
        let mut buffer = vec![0; FRAME_BYTES_MAX];
        while !ending.load(Ordering::Relaxed) {
            for host in self.wait() {
                self.take(host, &mut buffer);
            }
            self.deliver();
        }
    }

    /// The hosts that sent something, at the latest when a frame is due.
    fn wait(&self) -> Vec<usize> {
        let now = Instant::now();
        let due = self.waiting.peek().map(|waiting| waiting.0.due.saturating_duration_since(now));
        let timeout = due.unwrap_or(TICK).min(TICK);
        let timeout =
            rustix::event::Timespec { tv_sec: 0, tv_nsec: i64::from(timeout.subsec_nanos()) };
        let mut polled: Vec<PollFd<'_>> = self
            .devices
            .iter()
            .map(|device| PollFd::from_borrowed_fd(device.as_fd(), PollFlags::IN))
            .collect();
        if poll(&mut polled, Some(&timeout)).is_err() {
            return Vec::new();
        }
        let ready = polled.iter().enumerate().filter(|(_, fd)| !fd.revents().is_empty());
        ready.map(|(host, _)| host).collect()
    }

    /// Takes what a host sent, a bounded number of frames at a time.
    fn take(&mut self, from: usize, buffer: &mut [u8]) {
        for _ in 0..64 {
            let length = match self.devices[from].read(buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // The device is down while its host is being made or removed.
                Err(_) => return std::thread::sleep(Duration::from_millis(1)),
            };
            if length >= 14 {
                self.forward(from, &buffer[..length]);
            }
        }
    }

    fn forward(&mut self, from: usize, frame: &[u8]) {
        let station = |at: usize| <[u8; 6]>::try_from(&frame[at..at + 6]).unwrap_or_default();
        self.homes.insert(station(6), from);
        let home = self.homes.get(&station(0)).copied();
        for to in 0..HOSTS {
            if to != from && home.is_none_or(|home| home == to) {
                self.send(from, to, frame);
            }
        }
    }

    fn send(&mut self, from: usize, to: usize, frame: &[u8]) {
        let link = lock(&self.links)[from][to];
        if link.cut || self.random.chance(link.loss_percent) {
            return;
        }
        let copies = 1 + u64::from(self.random.chance(link.duplicate_percent));
        for _ in 0..copies {
            let delay = self.random.between(0, link.delay_ms_max);
            if delay == 0 {
                self.put(to, frame);
            } else if self.waiting.len() < WAITING_MAX {
                self.sent += 1;
                let due = Instant::now() + Duration::from_millis(delay);
                let waiting = Waiting { due, turn: self.sent, to, frame: frame.to_vec() };
                self.waiting.push(Reverse(waiting));
            }
        }
    }

    fn deliver(&mut self) {
        let now = Instant::now();
        while self.waiting.peek().is_some_and(|waiting| waiting.0.due <= now) {
            if let Some(Reverse(waiting)) = self.waiting.pop() {
                self.put(waiting.to, &waiting.frame);
            }
        }
    }

    /// A frame that the host's queue has no room for is lost, as on any wire.
    fn put(&mut self, to: usize, frame: &[u8]) {
        let _ = self.devices[to].write(frame);
    }
}
