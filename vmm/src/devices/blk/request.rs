//! A virtio-blk request as a plain value (virtio 1.2, section 5.2.6).

use crate::devices::chain::{Buffers, Segment, split_front, split_last_byte, total};

/// Bytes of a request's header.
pub const HEADER_BYTES: usize = 16;

/// A request whose framing is right; whether it can be done is `execute`'s matter.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// Where the header is; it is read when the request is carried out.
    pub header: Vec<Segment>,
    /// Data from the guest.
    pub from_guest: Vec<Segment>,
    /// Room for data to the guest.
    pub to_guest: Vec<Segment>,
    /// Address of the status byte.
    pub status: u64,
}

impl Request {
    /// Splits buffers by the request's framing, however the driver cut them into descriptors;
    /// `None` where there is no header or no room for the status.
    pub fn parse(mut buffers: Buffers) -> Option<Request> {
        let header = split_front(&mut buffers.readable, HEADER_BYTES)?;
        let status = split_last_byte(&mut buffers.writable)?;
        Some(Request { header, from_guest: buffers.readable, to_guest: buffers.writable, status })
    }

    /// Bytes of data in both directions together.
    pub fn data_bytes(&self) -> u64 {
        (total(&self.from_guest) + total(&self.to_guest)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn framing_does_not_depend_on_descriptors() {
        let segment = |address, len| Segment { address, len };
        let buffers = Buffers {
            readable: vec![segment(0, 10), segment(50, 6 + 512)],
            writable: vec![segment(1000, 512), segment(2000, 1)],
        };
        let request = Request::parse(buffers).unwrap();
        assert_eq!(request.header, [segment(0, 10), segment(50, 6)]);
        assert_eq!(request.from_guest, [segment(56, 512)]);
        assert_eq!(
            (request.to_guest.as_slice(), request.status),
            ([segment(1000, 512)].as_slice(), 2000)
        );
        assert_eq!(
            Request::parse(Buffers {
                readable: vec![segment(0, 15)],
                writable: vec![segment(9, 1)]
            }),
            None
        );
        assert_eq!(
            Request::parse(Buffers { readable: vec![segment(0, 16)], writable: vec![] }),
            None
        );
    }

    /// Random descriptor tables: every chain ends as a request inside RAM or as a refusal.
    #[test]
    fn any_descriptor_table_is_survived() {
        let ram = memory::map(16).unwrap();
        let mut random = 0xDEAD_BEEF_1234_5678u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let mut parsed = 0;
        for _ in 0..3000 {
            let mock = MockSplitQueue::new(&ram, 16);
            for index in 0..16 {
                let address = if next() % 4 == 0 { next() } else { next() % (17 << 20) };
                let len = if next() % 8 == 0 { next() as u32 } else { next() as u32 % 600 };
                let descriptor =
                    Descriptor::new(address, len, (next() % 8) as u16, (next() % 18) as u16);
                mock.desc_table().store(index, RawDescriptor::from(descriptor)).unwrap();
                mock.avail().ring().ref_at(index as usize).unwrap().store((next() % 18) as u16);
            }
            mock.avail().idx().store((next() % 17) as u16);
            let mut queue: Queue = mock.create_queue().unwrap();
            while let Some(chain) = queue.pop_descriptor_chain(&ram) {
                let Some(request) = Buffers::collect(chain, &ram).and_then(Request::parse) else {
                    continue;
                };
                parsed += 1;
                for segment in request.from_guest.iter().chain(&request.to_guest) {
                    assert!(segment.address + segment.len as u64 <= 16 << 20);
                }
                ram.write_obj(0u8, GuestAddress(request.status)).unwrap();
            }
            assert!(queue.iter(&ram).is_ok() || !queue.is_valid(&ram));
        }
        assert!(parsed > 0);
    }
}
