//! virtio-blk (virtio 1.2, section 5.2): one or several queues, one thread.
//!
//! `request` turns a descriptor chain into a plain request, `execute` decides what it asks for. On a
//! raw file `ring` has many under way by io_uring; where that is closed, and on disks that are
//! plugged into a running guest (nothing inside of the sandbox may make a ring), `execute` carries
//! them out one after another. `nbd` has many under way on a socket.
//!
//! # Changes that wait
//! A write, discard or write-zeroes passes only under the host's lease (`abi::lease`), looked at
//! right before it is carried out, handed to the kernel or begun to be sent. Otherwise it is held back, without an error,
//! and tried again every [`LEASE_LOOK`]; so is one that finds the disk full. Reads and flushes go on.
//!
//! What passed just before the lease ended is not called back. On a file that is what the kernel
//! has: one request of each disk, or of a ring's no more than [`ring::CHANGE_BYTES_MAX`]; the leader waits a margin beyond the lease before it acts,
//! and a call that hangs longer than that changes nothing but this host's own file, which others
//! reach only through this host's storage process. On a socket it is what was sent and is not
//! answered; the volume's home cuts this connection off, and waits for what it is executing,
//! before it admits anyone else.

pub mod execute;
pub mod link;
pub mod nbd;
pub mod request;
pub mod ring;

use super::chain::{Buffers, copy_in, total};
use super::counters::Counters;
use super::rate::{Limiter, RateLink};
use super::{Backend, Device, DeviceError, DeviceKind, Work, borrow};
use crate::config::{DiskConfig, DiskEngine, DiskSource};
use crate::process::resources::{Access, ResourceError, Supply};
use abi::lease::LeaseView;
use execute::{Act, Job, perform};
use link::DiskLink;
use nbd::{Answer, NbdClient};
use request::Request;
use ring::Ring;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of a sector, the unit of every address.
pub const SECTOR_BYTES: u64 = 512;
/// Size of a queue.
const QUEUE_SIZE: u16 = 256;
/// Most queues of a disk.
pub const QUEUES_MAX: u16 = 16;
/// Most requests of a disk that are taken and not answered.
const UNDER_WAY_MAX: usize = ring::ENTRIES as usize;
/// How soon the kernel is asked again to take what it had no room for.
const ENTER_RETRY: Duration = Duration::from_millis(1);
/// Most data pieces of one request.
const SEGMENTS: u32 = 254;
/// Most sectors of one discard or write-zeroes request.
pub const CLEAR_SECTORS_MAX: u32 = 1 << 22;
/// How often a held change looks at the lease again.
pub const LEASE_LOOK: Duration = Duration::from_millis(50);
/// How long a change waits before it tries a full disk again.
const FULL_DISK_RETRY: Duration = Duration::from_secs(1);
/// How long requests in flight may go on when the device shall stop, so that a driver's reset does
/// not break the connection.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// How often a disk that comes to rest looks whether it still shall.
const QUIESCE_LOOK: Duration = Duration::from_millis(20);
/// Length of a serial number.
pub const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Where a disk's bytes are.
#[derive(Debug)]
pub enum Source {
    /// A file or block device, and what has requests under way on it where there is such a thing.
    Raw(File, Option<Box<Ring>>),
    /// An NBD server.
    Nbd(Box<NbdClient>),
}

/// A disk's backend.
#[derive(Debug)]
pub struct Disk {
    /// Where its bytes are.
    pub source: Source,
    /// Its size.
    pub sectors: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Its serial number, zero padded.
    pub serial: [u8; SERIAL_BYTES],
    queues: u16,
    rate: Arc<RateLink>,
    limiter: Limiter,
    lease: Option<Arc<LeaseView>>,
    /// Requests that go into the ring next.
    pending: VecDeque<Job>,
    /// The kernel did not take all that is in the ring.
    untaken: bool,
    /// Changes that wait for the lease or for room.
    held: VecDeque<Job>,
    /// When the disk was found full: not before then is it tried again.
    full_until: Option<Instant>,
    link: Option<Arc<DiskLink>>,
}

/// Opens a disk before the sandbox closes; its changes need `lease` where there is one.
pub fn open(
    config: &DiskConfig,
    supply: &mut Supply,
    lease: Option<Arc<LeaseView>>,
) -> Result<Device, ResourceError> {
    let ring = |file: &File| match config.engine {
        DiskEngine::Thread => Ok(None),
        DiskEngine::Auto => Ok(Ring::new(file).ok()),
        DiskEngine::IoUring => match Ring::new(file) {
            Ok(ring) => Ok(Some(ring)),
            Err(error) => {
                Err(format!("engine io_uring: {error}; with \"auto\" a thread does its work"))
            }
        },
    };
    make(config, supply, lease, &ring)
}

/// Opens a disk inside of the sandbox, where no ring can be made.
pub fn open_inside(
    config: &DiskConfig,
    supply: &mut Supply,
    lease: Option<Arc<LeaseView>>,
) -> Result<Device, ResourceError> {
    let ring = |_: &File| match config.engine {
        DiskEngine::Auto | DiskEngine::Thread => Ok(None),
        DiskEngine::IoUring => {
            Err("engine io_uring: only for disks that are there at the start; use \"auto\"".into())
        }
    };
    make(config, supply, lease, &ring)
}

fn make(
    config: &DiskConfig,
    supply: &mut Supply,
    lease: Option<Arc<LeaseView>>,
    ring: &dyn Fn(&File) -> Result<Option<Ring>, String>,
) -> Result<Device, ResourceError> {
    let what = format!("disk {:?}", config.id);
    let unusable = |reason: String| ResourceError::Unusable { what: what.clone(), reason };
    let access = if config.read_only { Access::Read } else { Access::Write };
    let mut link = None;
    let (source, size_bytes) = match &config.source {
        DiskSource::Raw(resource) => {
            let mut file = supply.file(resource, access, &what)?;
            let size = file
                .seek(SeekFrom::End(0))
                .map_err(|error| unusable(format!("find its size: {error}")))?;
            let ring = ring(&file).map_err(unusable)?;
            (Source::Raw(file, ring.map(Box::new)), size)
        }
        DiskSource::Nbd { socket, size_bytes, epoch } => {
            let socket = supply.stream(socket, &what)?;
            let client =
                NbdClient::new(socket, *epoch).map_err(|error| unusable(error.to_string()))?;
            let made = DiskLink::new().map_err(|error| unusable(error.to_string()))?;
            link = Some(Arc::new(made));
            (Source::Nbd(Box::new(client)), *size_bytes)
        }
    };
    if size_bytes < SECTOR_BYTES {
        return Err(unusable(format!(
            "{size_bytes} bytes; a disk has at least one sector of {SECTOR_BYTES}"
        )));
    }
    let mut serial = [0; SERIAL_BYTES];
    let shown = config.serial.len().min(SERIAL_BYTES);
    serial[..shown].copy_from_slice(&config.serial.as_bytes()[..shown]);
    let sectors = size_bytes / SECTOR_BYTES;
    let rate = Arc::new(RateLink::new(config.limits));
    let disk = Disk {
        source,
        sectors,
        read_only: config.read_only,
        serial,
        queues: config.queues,
        rate: Arc::clone(&rate),
        limiter: Limiter::default(),
        lease,
        pending: VecDeque::new(),
        untaken: false,
        held: VecDeque::new(),
        full_until: None,
        link: link.clone(),
    };
    Ok(Device {
        id: config.id.clone(),
        kind: DeviceKind::Disk,
        virtio_type: 2,
        features: disk.features(),
        queue_sizes: vec![QUEUE_SIZE; usize::from(config.queues)],
        queues_needed: 1,
        config: disk.config().into(),
        ring: None,
        link,
        balloon: None,
        rates: vec![rate],
        backend: Box::new(disk),
    })
}

impl Disk {
    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX;
        if self.queues > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        if self.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else if matches!(self.source, Source::Raw(..)) {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        features
    }

    /// `struct virtio_blk_config`.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &(SECTOR_BYTES as u32).to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        for at in [36, 48] {
            put(at, &CLEAR_SECTORS_MAX.to_le_bytes());
            put(at + 4, &1u32.to_le_bytes());
        }
        put(44, &(4096 / SECTOR_BYTES as u32).to_le_bytes());
        put(56, &[1]);
        config
    }

    /// Takes every request that waits, and answers what can be answered at once; `false`: there may
    /// be more, but as many as may be are under way.
    fn serve(&mut self, work: &mut Work) -> Result<bool, DeviceError> {
        let mut all_taken = true;
        for queue in 0..work.queues.len() {
            // A driver may leave queues out.
            if work.queues[queue].ready() {
                all_taken &= self.serve_queue(queue, work)?;
            }
        }
        Ok(all_taken)
    }

    fn serve_queue(&mut self, queue: usize, work: &mut Work) -> Result<bool, DeviceError> {
        let ram = work.ram.clone();
        let mut promised = false;
        loop {
            work.busy(queue)?;
            let mut taken = 0;
            loop {
                if self.under_way() >= UNDER_WAY_MAX {
                    return Ok(false);
                }
                // The rest waits in the queue, whose driver needs not ring for it again.
                if !self.limiter.passes(&self.rate) {
                    return Ok(true);
                }
                let Some(chain) = work.queues[queue].pop_descriptor_chain(&ram) else { break };
                let head = chain.head_index();
                let request = Buffers::collect(chain, &ram).and_then(Request::parse);
                self.begin(queue, head, request, work)?;
                taken += 1;
                if work.orders.is_pending() {
                    return Ok(true);
                }
            }
            if promised && taken == 0 {
                return Err(DeviceError::Index(queue));
            }
            promised = work.idle(queue)?;
            if !promised {
                return Ok(true);
            }
        }
    }

    /// Requests that were taken and are not answered.
    fn under_way(&self) -> usize {
        self.held.len()
            + self.pending.len()
            + match &self.source {
                Source::Raw(_, ring) => ring.as_ref().map_or(0, |ring| ring.len()),
                Source::Nbd(client) => client.len(),
            }
    }

    fn begin(
        &mut self,
        queue: usize,
        head: u16,
        request: Option<Request>,
        work: &mut Work,
    ) -> Result<(), DeviceError> {
        self.limiter.take(request.as_ref().map_or(0, Request::data_bytes));
        let Some(request) = request else {
            work.counters.failures.add(1);
            return finish(work, queue, head, 0);
        };
        let act = self.decide(&request, work);
        self.proceed(Job { queue, head, request, act, done: 0 }, work)
    }

    /// Carries a request out, hands it to the ring or the connection, or holds it back.
    fn proceed(&mut self, job: Job, work: &mut Work) -> Result<(), DeviceError> {
        if matches!(job.act, Act::GetId | Act::Refuse(_)) {
            return self.answer(&job, Ok(()), work);
        }
        match &mut self.source {
            // A remote disk's requests keep their order in the connection's own list.
            Source::Nbd(client) => client.submit(job),
            Source::Raw(_, Some(_)) => self.pending.push_back(job),
            Source::Raw(_, None) => return self.perform(job, work),
        }
        Ok(())
    }

    /// Carries a request out on the file, here and now.
    fn perform(&mut self, job: Job, work: &mut Work) -> Result<(), DeviceError> {
        if job.act.changes() && !self.may_change() {
            self.held.push_back(job);
            return Ok(());
        }
        let Source::Raw(file, _) = &self.source else { return Ok(()) };
        match perform(file, &job, work) {
            Err(error) if is_full(&error) && job.act.changes() => self.hold_for_room(job),
            done => return self.answer(&job, done, work),
        }
        Ok(())
    }

    /// Hands what is pending to the kernel and answers what it is done with, until it says no more.
    fn turn_ring(&mut self, work: &mut Work) -> Result<(), DeviceError> {
        loop {
            self.fill_ring(work)?;
            let Source::Raw(_, Some(ring)) = &mut self.source else { return Ok(()) };
            self.untaken = !ring.enter(0)?;
            if !self.reap_ring(work)? {
                return Ok(());
            }
        }
    }

    /// Puts pending requests into the ring; the lease is looked at here, right before the kernel
    /// gets them.
    fn fill_ring(&mut self, work: &mut Work) -> Result<(), DeviceError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let allowed = self.may_change();
        for _ in 0..self.pending.len() {
            let Some(job) = self.pending.pop_front() else { break };
            if job.act.changes() && !allowed {
                self.held.push_back(job);
                continue;
            }
            let moves = matches!(job.act, Act::Read(_) | Act::Write(_));
            if moves && job.data().is_empty() {
                self.answer(&job, Ok(()), work)?;
                continue;
            }
            let Source::Raw(_, Some(ring)) = &mut self.source else { break };
            if !ring.has_room_for(&job) {
                self.pending.push_front(job);
                break;
            }
            if let Some((job, error)) = ring.push(job, &work.ram) {
                self.answer(&job, Err(error), work)?;
            }
        }
        Ok(())
    }

    /// Answers what the kernel is done with; `true`: something is to go into the ring again.
    fn reap_ring(&mut self, work: &mut Work) -> Result<bool, DeviceError> {
        let waits_for_room = !self.pending.is_empty();
        let (mut freed, mut again) = (false, false);
        loop {
            let Source::Raw(_, Some(ring)) = &mut self.source else { return Ok(false) };
            let Some((mut job, moved)) = ring.reap(&work.ram) else {
                return Ok(again || freed && waits_for_room);
            };
            freed = true;
            match moved {
                Ok(0) if matches!(job.act, Act::Read(_) | Act::Write(_)) => {
                    self.answer(&job, Err(io::ErrorKind::UnexpectedEof.into()), work)?;
                }
                Ok(bytes) if job.done + bytes < total(job.data()) => {
                    job.done += bytes;
                    self.pending.push_back(job);
                    again = true;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    self.pending.push_back(job);
                    again = true;
                }
                // The file system can't, so that zeroes are written, or nothing has to be done.
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    self.perform(job, work)?
                }
                Err(error) if is_full(&error) && job.act.changes() => self.hold_for_room(job),
                done => self.answer(&job, done.map(drop), work)?,
            }
        }
    }

    /// Whether the lease allows changes now.
    fn may_change(&self) -> bool {
        self.lease.as_ref().is_none_or(|lease| lease.allows_writes())
    }

    /// A full disk is not an error of the guest's: the change waits until there is room.
    fn hold_for_room(&mut self, job: Job) {
        self.held.push_back(job);
        self.full_until = Some(Instant::now() + FULL_DISK_RETRY);
    }

    /// Stores a request's status and gives its buffers back.
    fn answer(
        &mut self,
        job: &Job,
        done: io::Result<()>,
        work: &mut Work,
    ) -> Result<(), DeviceError> {
        let (status, written) = match (job.act, done) {
            (Act::Refuse(status), _) => (status, 0),
            (_, Err(_)) => (VIRTIO_BLK_S_IOERR as u8, 0),
            (Act::GetId, Ok(())) => {
                let written = copy_in(&work.ram, &job.request.to_guest, &self.serial);
                (VIRTIO_BLK_S_OK as u8, written as u32)
            }
            (Act::Read(_), Ok(())) => (VIRTIO_BLK_S_OK as u8, total(&job.request.to_guest) as u32),
            (_, Ok(())) => (VIRTIO_BLK_S_OK as u8, 0),
        };
        count(job, status == VIRTIO_BLK_S_OK as u8, &work.counters);
        let _ = work.ram.write_obj(status, GuestAddress(job.request.status));
        finish(work, job.queue, job.head, written + 1)
    }

    /// Tries again what was held back.
    fn retry(&mut self, work: &mut Work) -> Result<(), DeviceError> {
        if self.full_until.is_some_and(|until| Instant::now() < until) || !self.may_change() {
            return Ok(());
        }
        self.full_until = None;
        for _ in 0..self.held.len() {
            // What finds the disk full goes to the end, and the rest waits for the next time.
            let Some(job) = self.held.pop_front() else { break };
            self.proceed(job, work)?;
            if self.full_until.is_some() || work.orders.is_pending() {
                break;
            }
        }
        Ok(())
    }

    /// Sends and receives on a remote disk's connection.
    fn exchange(&mut self, work: &mut Work) -> Result<(), DeviceError> {
        let allowed = self.may_change();
        let (Source::Nbd(client), Some(link)) = (&mut self.source, &self.link) else {
            return Ok(());
        };
        if let Some((socket, epoch)) = link.take() {
            client.replace(socket, epoch);
        }
        let mut answered = Vec::new();
        if client.exchange(work, allowed, &mut answered).is_err() {
            client.lose();
        }
        if client.socket().is_none() {
            link.lose();
        }
        self.answer_all(answered, work)
    }

    /// How long to sleep at most.
    fn patience(&self) -> Option<Duration> {
        let waits_for_lease = match &self.source {
            Source::Raw(..) => !self.held.is_empty(),
            Source::Nbd(client) => !self.held.is_empty() || client.holds_changes(),
        };
        let lease = (waits_for_lease && !self.may_change()).then_some(LEASE_LOOK);
        let full = self.full_until.map(|until| until.saturating_duration_since(Instant::now()));
        let full = full.filter(|_| lease.is_none() && !self.held.is_empty());
        let untaken = self.untaken.then_some(ENTER_RETRY);
        [lease, full, untaken, self.limiter.wait()].into_iter().flatten().min()
    }

    /// Sleeps until there is something to do.
    fn sleep(&self, work: &Work) -> Result<(), DeviceError> {
        let mut more = Vec::with_capacity(2);
        if let Some(link) = &self.link {
            more.push((borrow(link.wake()), PollFlags::IN));
        }
        match &self.source {
            Source::Raw(_, Some(ring)) => more.push((ring.wake(), PollFlags::IN)),
            Source::Nbd(client) => {
                if let Some(socket) = client.socket() {
                    let send =
                        if client.wants_to_send() { PollFlags::OUT } else { PollFlags::empty() };
                    more.push((socket.as_fd(), PollFlags::IN | send));
                }
            }
            Source::Raw(_, None) => {}
        }
        work.poll_any(&more, self.patience())?;
        Ok(())
    }

    /// Waits for what is in flight, without beginning more, while the device shall come to rest.
    fn quiesce(&mut self, work: &mut Work) -> Result<(), DeviceError> {
        while work.orders.is_to_hold() {
            let at_rest = match &mut self.source {
                Source::Raw(_, None) => true,
                Source::Raw(_, Some(ring)) if ring.is_empty() => true,
                Source::Raw(_, Some(ring)) => {
                    ring.enter(1)?;
                    // What was moved in part stays pending.
                    self.reap_ring(work)?;
                    false
                }
                Source::Nbd(_) => self.quiesce_connection(work)?,
            };
            if at_rest {
                break;
            }
        }
        Ok(())
    }

    /// What a connection has not asked for waits, and so does all of it where the connection is
    /// lost. `true`: nothing is in flight.
    fn quiesce_connection(&mut self, work: &mut Work) -> Result<bool, DeviceError> {
        let Source::Nbd(client) = &mut self.source else { return Ok(true) };
        let mut answered = Vec::new();
        if client.finish_sent(work, &mut answered).is_err() {
            client.lose();
            self.link.iter().for_each(|link| link.lose());
        }
        let wanted = client.socket().filter(|_| client.in_flight() > 0).map(|socket| {
            let send = if client.wants_to_send() { PollFlags::OUT } else { PollFlags::empty() };
            PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN | send)
        });
        let at_rest = wanted.is_none();
        if let Some(wanted) = wanted {
            let look = Timespec { tv_sec: 0, tv_nsec: QUIESCE_LOOK.subsec_nanos().into() };
            let _ = poll(&mut [wanted], Some(&look));
        }
        self.answer_all(answered, work)?;
        Ok(at_rest)
    }

    fn answer_all(
        &mut self,
        answered: Vec<(Job, Answer)>,
        work: &mut Work,
    ) -> Result<(), DeviceError> {
        for (job, answer) in answered {
            match answer {
                Answer::Done => self.answer(&job, Ok(()), work)?,
                Answer::Failed => self.answer(&job, Err(io::ErrorKind::Other.into()), work)?,
                Answer::NoSpace if job.act.changes() => self.hold_for_room(job),
                Answer::NoSpace => {
                    self.answer(&job, Err(io::ErrorKind::StorageFull.into()), work)?
                }
            }
        }
        Ok(())
    }

    /// The device stops: what was held back is never answered, and what a connection has in flight
    /// ends or the connection does, because its data is in memory that the driver takes back. What
    /// the kernel has of a file ends by itself and is waited for.
    fn settle(&mut self, work: &mut Work) -> Result<(), DeviceError> {
        self.held.clear();
        self.pending.clear();
        self.full_until = None;
        self.untaken = false;
        match &mut self.source {
            Source::Raw(_, Some(ring)) => {
                while !ring.is_empty() {
                    ring.enter(1)?;
                    while ring.reap(&work.ram).is_some() {}
                }
            }
            Source::Raw(_, None) => {}
            Source::Nbd(_) => self.settle_connection(work),
        }
        Ok(())
    }

    fn settle_connection(&mut self, work: &mut Work) {
        let Source::Nbd(client) = &mut self.source else { return };
        client.forget();
        let end = Instant::now() + STOP_GRACE;
        let mut answered = Vec::new();
        while client.in_flight() > 0 {
            let left = end.saturating_duration_since(Instant::now());
            let Some(socket) = client.socket().filter(|_| !left.is_zero()) else { break };
            let send = if client.wants_to_send() { PollFlags::OUT } else { PollFlags::empty() };
            let wanted = PollFd::new(socket, PollFlags::IN | send);
            let timeout =
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let _ = poll(&mut [wanted], Some(&timeout));
            if client.exchange(work, false, &mut answered).is_err() {
                break;
            }
        }
        if client.in_flight() > 0 {
            client.lose();
            if let Some(link) = &self.link {
                link.lose();
            }
        }
        client.forget();
    }
}

fn count(job: &Job, is_done: bool, counters: &Counters) {
    let bytes = total(job.data()) as u64;
    match job.act {
        _ if !is_done => counters.failures.add(1),
        Act::Read(_) => {
            counters.reads.add(1);
            counters.read_bytes.add(bytes);
        }
        Act::Write(_) | Act::Discard { .. } | Act::Zero { .. } => {
            counters.writes.add(1);
            counters.written_bytes.add(bytes);
        }
        Act::Flush => counters.flushes.add(1),
        Act::GetId | Act::Refuse(_) => {}
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn finish(work: &mut Work, queue: usize, head: u16, written: u32) -> Result<(), DeviceError> {
    let ram = work.ram.clone();
    work.queues[queue].add_used(&ram, head, written)?;
    work.interrupt(queue)
}

impl Disk {
    fn serve_until_stopped(&mut self, work: &mut Work) -> Result<(), DeviceError> {
        loop {
            self.quiesce(work)?;
            if work.orders.obey() {
                return Ok(());
            }
            self.retry(work)?;
            let all_taken = self.serve(work)?;
            self.turn_ring(work)?;
            self.exchange(work)?;
            if all_taken || self.under_way() >= UNDER_WAY_MAX {
                self.sleep(work)?;
            }
        }
    }
}

impl Backend for Disk {
    fn run(&mut self, mut work: Work) -> Result<(), DeviceError> {
        let served = self.serve_until_stopped(&mut work);
        served.and(self.settle(&mut work))
    }
}
