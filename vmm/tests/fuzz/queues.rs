//! Every device's queues: its own thread body takes them from memory that says anything.

use crate::world::{self, BUFFERS, QUEUE_SIZE};
use abi::packet_ring::{Direction, FRAME_BYTES_MAX, Region};
use fuzz::{Source, Target, check};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm::config::{
    BalloonConfig, DiskConfig, DiskEngine, DiskSource, NetBackend, NetConfig, Resource, RngConfig,
    VsockConfig,
};
use vmm::devices::orders::Orders;
use vmm::devices::{Device, QueueInterrupt, Work, balloon, blk, net, rng, vsock};
use vmm::machine::Interrupts;
use vmm::machine::memory::Ram;
use vmm::pci::msix::Msix;
use vmm::process::resources::Supply;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const DISK_BYTES: u64 = 64 << 10;
/// Looks at a device before it counts as having done what it will do.
const LOOKS: u32 = 60;
const VECTORS: u16 = 8;
/// A thread that does not rest by then never will.
const REST_TIME_MAX: Duration = Duration::from_secs(60);

/// Fuzzes a device's queues; `open` makes a device, `after` looks at what became of it.
fn queues(
    name: &'static str,
    open: &mut dyn FnMut(&mut Source<'_>) -> Device,
    after: &mut dyn FnMut(&mut Source<'_>),
) {
    let Some((machine, interrupts)) = world::machine(name) else { return };
    let run = &mut |source: &mut Source<'_>| {
        let device = open(source);
        drive(&machine.ram, &interrupts, device, source);
        after(source);
    };
    check(Target { name, inputs: 2_000, samples: Vec::new(), run });
}

/// Lets a device run on queues that `source` fills, until it ends or has nothing more to do.
fn drive(ram: &Ram, interrupts: &Interrupts, mut device: Device, source: &mut Source<'_>) {
    let count = device.queue_sizes.len();
    for queue in 0..count {
        world::write_queue(ram, queue, source);
    }
    fill_buffers(ram, source);
    let features = device.features & if source.flag() { u64::MAX } else { source.double() };
    let queues = (0..count).map(|queue| queue_at(queue, source.flag())).collect();
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let doorbell = event();
    let orders = Arc::new(Orders::new().unwrap());
    let work = Work {
        ram: ram.clone(),
        queues,
        doorbell: doorbell.try_clone().unwrap(),
        orders: Arc::clone(&orders),
        interrupt: QueueInterrupt {
            msix: Arc::new(Msix::new(interrupts.clone(), VECTORS)),
            isr: Arc::default(),
            vectors: (0..count as u16).collect(),
        },
        features,
        counters: Arc::default(),
    };
    std::thread::scope(|scope| {
        let of_thread = Arc::clone(&orders);
        let thread = scope.spawn(move || {
            let result = device.backend.run(work);
            of_thread.end();
            result
        });
        for _ in 0..=source.byte() % 3 {
            doorbell.write(1).unwrap();
            for _ in 0..LOOKS {
                if thread.is_finished() {
                    break;
                }
                std::thread::yield_now();
            }
            // The guest goes on while the device works.
            let queue = source.below(count as u64) as usize;
            let index = u16::from(source.byte() % 20);
            ram.write_obj(index, GuestAddress(world::ring(queue) + 0x1002)).unwrap();
            if source.flag() {
                orders.hold();
                let deadline = Instant::now() + REST_TIME_MAX;
                assert!(orders.wait_until_held(deadline), "the thread does not come to rest");
                orders.go_on();
            }
        }
        orders.stop();
        if let Err(error) = thread.join().expect("the device's thread panicked") {
            assert!(!error.to_string().is_empty());
        }
    });
}

/// What buffers hold: a request's header, mostly one that a disk knows.
fn fill_buffers(ram: &Ram, source: &mut Source<'_>) {
    for piece in 0..16u64 {
        let at = GuestAddress(BUFFERS + 0x1000 + piece * 0x200);
        let kind = source.pick(&[0u32, 1, 4, 8, 11, 13, 99]);
        let sector = u64::from(source.byte()) << (source.byte() % 4 * 16);
        ram.write_obj(kind, at).unwrap();
        ram.write_obj(sector, GuestAddress(at.0 + 8)).unwrap();
        ram.write_slice(source.bytes(48), GuestAddress(at.0 + 16)).unwrap();
    }
}

fn queue_at(queue: usize, event_idx: bool) -> Queue {
    let at = world::ring(queue) as u32;
    let mut made = Queue::new(256).unwrap();
    made.set_size(QUEUE_SIZE);
    made.set_desc_table_address(Some(at), Some(0));
    made.set_avail_ring_address(Some(at + 0x1000), Some(0));
    made.set_used_ring_address(Some(at + 0x2000), Some(0));
    made.set_event_idx(event_idx);
    made.set_ready(true);
    made
}

pub(crate) fn open_disk(file: &File, engine: DiskEngine) -> Device {
    let source = DiskSource::Raw(Resource::Descriptor(0));
    let config = DiskConfig { engine, ..DiskConfig::new("disk", source, "serial") };
    let mut supply = Supply::descriptors(vec![file.try_clone().unwrap().into()]);
    blk::open(&config, &mut supply, None).unwrap()
}

#[test]
fn disk_queue() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    let mut rounds = 0u64;
    let after = &mut |_: &mut Source<'_>| {
        assert_eq!(file.metadata().unwrap().len(), DISK_BYTES);
        rounds += 1;
        if rounds.is_multiple_of(512) {
            // Room that the requests took is given back.
            file.set_len(0).unwrap();
            file.set_len(DISK_BYTES).unwrap();
            file.write_all_at(b"sector", 512).unwrap();
        }
    };
    let open = &mut |source: &mut Source<'_>| {
        open_disk(&file, source.pick(&[DiskEngine::Auto, DiskEngine::Thread]))
    };
    queues("disk_queue", open, after);
}

/// A remote disk whose server answers what nobody asked.
#[test]
fn remote_disk_queue() {
    let nbd = DiskSource::Nbd { socket: Resource::Descriptor(0), size_bytes: DISK_BYTES, epoch: 0 };
    let config = DiskConfig::new("disk", nbd, "");
    let open = &mut |source: &mut Source<'_>| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for _ in 0..source.byte() % 6 {
            theirs.write_all(&nbd_answer(source)).unwrap();
        }
        // It goes then: a server that stays and is silent holds a reset up for a while.
        drop(theirs);
        let mut supply = Supply::descriptors(vec![ours.into()]);
        blk::open(&config, &mut supply, None).unwrap()
    };
    queues("remote_disk_queue", open, &mut |_| {});
}

/// A simple reply, or nearly one.
fn nbd_answer(source: &mut Source<'_>) -> Vec<u8> {
    if source.byte() == 0 {
        return source.bytes(64).to_vec();
    }
    let mut answer = 0x6744_6698u32.to_be_bytes().to_vec();
    answer.extend(source.pick(&[0u32, 0, 0, 5, 28, u32::MAX]).to_be_bytes());
    answer.extend(u64::from(source.byte() % 8).to_be_bytes());
    answer.extend(source.bytes(512));
    answer
}

#[test]
fn net_queues() {
    let region = Region::create().unwrap();
    let mut to_guest = region.producer(Direction::ToGuest).unwrap();
    let mut from_guest = region.consumer(Direction::FromGuest).unwrap();
    let config = NetConfig::new("nic", "fa:16:3e:00:00:01", 1500, NetBackend::Ring([0, 1, 2]));
    let open = &mut |_: &mut Source<'_>| {
        let descriptors: Vec<OwnedFd> = region.descriptors().unwrap().into();
        to_guest.push(&[5; 60]).unwrap();
        to_guest.publish().unwrap();
        net::open(&config, &mut Supply::descriptors(descriptors)).unwrap()
    };
    let mut frame = [0; FRAME_BYTES_MAX];
    let after = &mut |_: &mut Source<'_>| {
        while let Some(len) = from_guest.pop(&mut frame).unwrap() {
            assert!((14..=FRAME_BYTES_MAX).contains(&len), "a frame of {len} bytes went out");
        }
    };
    queues("net_queues", open, after);
}

#[test]
fn rng_queue() {
    let config = RngConfig { bytes_per_second: 1 << 20 };
    queues("rng_queue", &mut |_| rng::open(&config), &mut |_| {});
}

#[test]
fn balloon_queues() {
    let config = BalloonConfig { target_mib: 4, deflate_on_oom: true, free_page_reporting: true };
    queues("balloon_queues", &mut |_| balloon::open(&config).unwrap(), &mut |_| {});
}

#[test]
fn vsock_queues() {
    let place = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(place.path().join("socket")).unwrap();
    let config = VsockConfig { cid: 3, socket: Resource::Descriptor(0), connector: None };
    let open = &mut |_: &mut Source<'_>| {
        let descriptors = vec![listener.try_clone().unwrap().into()];
        vsock::open(&config, &mut Supply::descriptors(descriptors)).unwrap().0
    };
    queues("vsock_queues", open, &mut |_| {});
}
