//! Descriptor chains: whatever a table holds, the buffers lie in RAM and the framing is right.

use crate::world::{self, BUFFERS, MEMORY_MIB, QUEUE_SIZE, RAM_BYTES};
use fuzz::{Source, Target, check};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm::devices::blk::request::{HEADER_BYTES, Request};
use vmm::devices::chain::{Buffers, SEGMENTS_MAX, Segment, copy_in, copy_out, total};
use vmm::machine::memory::{self, Ram};

#[test]
fn chains() {
    let ram = memory::map(MEMORY_MIB).unwrap();
    let run = &mut |source: &mut Source<'_>| take_apart(&ram, source);
    check(Target { name: "chains", inputs: 10_000, samples: Vec::new(), run });
}

fn take_apart(ram: &Ram, source: &mut Source<'_>) {
    world::write_queue(ram, 0, source);
    ram.write_slice(source.bytes(512), GuestAddress(BUFFERS + 0x1000)).unwrap();
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    let at = world::ring(0);
    queue.set_desc_table_address(Some(at as u32), Some(0));
    queue.set_avail_ring_address(Some(at as u32 + 0x1000), Some(0));
    queue.set_used_ring_address(Some(at as u32 + 0x2000), Some(0));
    queue.set_event_idx(source.flag());
    queue.set_ready(true);
    let mut chains = 0;
    while let Some(chain) = queue.pop_descriptor_chain(ram) {
        let head = chain.head_index();
        chains += 1;
        assert!(chains <= u32::from(QUEUE_SIZE), "more chains than the queue has room for");
        if let Some(buffers) = Buffers::collect(chain, ram) {
            lie_in_ram(&buffers.readable);
            lie_in_ram(&buffers.writable);
            assert!(buffers.readable.len() + buffers.writable.len() <= SEGMENTS_MAX);
            let (readable, writable) = (total(&buffers.readable), total(&buffers.writable));
            let mut some = [0; 96];
            assert_eq!(copy_out(ram, &buffers.readable, &mut some), readable.min(96));
            if let Some(request) = Request::parse(buffers) {
                assert_eq!(total(&request.header), HEADER_BYTES);
                assert_eq!(total(&request.from_guest) + HEADER_BYTES, readable);
                assert_eq!(total(&request.to_guest) + 1, writable);
                assert!(request.status < RAM_BYTES);
                copy_in(ram, &request.to_guest, &some);
            }
        }
        // A head beyond the table is refused; any other is given back.
        let _ = queue.add_used(ram, head, 0);
    }
}

fn lie_in_ram(segments: &[Segment]) {
    for segment in segments {
        assert!(segment.len > 0);
        let end = segment.address.checked_add(segment.len as u64);
        assert!(end.is_some_and(|end| end <= RAM_BYTES), "{segment:x?} is not in RAM");
    }
}
