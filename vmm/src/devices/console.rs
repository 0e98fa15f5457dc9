//! Console output: from the guest's ring (`abi::boot::ConsoleRing`) to where it is kept.
//!
//! The vCPU that kicks copies what waits and stores `tail` before it goes on; the guest never
//! waits for anyone. Neither of the ring's indices is trusted.

use crate::config::{CONSOLE_HEADER_BYTES, CONSOLE_MAGIC};
use crate::machine::boot::unikernel::{CONSOLE, CONSOLE_BYTES};
use crate::machine::memory::Ram;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, GuestAddress};

const HEAD: GuestAddress = GuestAddress(CONSOLE);
const TAIL: GuestAddress = GuestAddress(CONSOLE + 4);
const BYTES: u64 = CONSOLE + 16;

/// Where console output goes.
#[derive(Debug)]
pub enum Sink {
    /// Nowhere.
    Nowhere,
    /// Standard output.
    Stdout,
    /// A file that keeps the last bytes.
    Ring(RingFile),
}

impl Sink {
    /// Writes; a sink that fails loses output: a full disk must not stop a guest that talks.
    pub fn write(&mut self, bytes: &[u8]) {
        let _ = match self {
            Sink::Nowhere => Ok(()),
            Sink::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(bytes).and_then(|()| out.flush())
            }
            Sink::Ring(ring) => ring.write(bytes),
        };
    }
}

/// The file form of a console: see [`crate::config::Console`].
#[derive(Debug)]
pub struct RingFile {
    file: File,
    capacity_bytes: u64,
    written: u64,
}

impl RingFile {
    /// Takes a file: one that already is a console file goes on where it stood.
    pub fn open(file: File, capacity_bytes: u64) -> io::Result<RingFile> {
        let mut header = [0u8; CONSOLE_HEADER_BYTES as usize];
        let known = file.read_exact_at(&mut header, 0).is_ok()
            && header[..8] == CONSOLE_MAGIC.to_le_bytes();
        let mut written = 0;
        if known {
            let mut count = [0u8; 8];
            count.copy_from_slice(&header[8..]);
            written = u64::from_le_bytes(count);
        } else {
            header = [0; CONSOLE_HEADER_BYTES as usize];
            header[..8].copy_from_slice(&CONSOLE_MAGIC.to_le_bytes());
            file.write_all_at(&header, 0)?;
        }
        Ok(RingFile { file, capacity_bytes, written })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let keep = bytes.len().min(self.capacity_bytes as usize);
        let mut at = self.written + (bytes.len() - keep) as u64;
        let mut rest = &bytes[bytes.len() - keep..];
        while !rest.is_empty() {
            let position = at % self.capacity_bytes;
            let step = rest.len().min((self.capacity_bytes - position) as usize);
            self.file.write_all_at(&rest[..step], CONSOLE_HEADER_BYTES + position)?;
            at += step as u64;
            rest = &rest[step..];
        }
        self.written = at;
        self.file.write_all_at(&self.written.to_le_bytes(), 8)
    }
}

/// The VMM's end of the console ring.
pub struct Console {
    sink: Sink,
    tail: u32,
    buffer: Vec<u8>,
}

impl Console {
    /// A console that writes to `sink`.
    pub fn new(sink: Sink) -> Console {
        Console { sink, tail: 0, buffer: Vec::new() }
    }

    /// Takes what waits in the ring; returns the number of bytes taken.
    pub fn drain(&mut self, ram: &Ram) -> usize {
        let Ok(head) = ram.load::<u32>(HEAD, Ordering::Acquire) else { return 0 };
        let mut waiting = head.wrapping_sub(self.tail);
        if waiting > CONSOLE_BYTES {
            self.tail = head.wrapping_sub(CONSOLE_BYTES);
            waiting = CONSOLE_BYTES;
        }
        self.buffer.resize(waiting as usize, 0);
        let start = self.tail % CONSOLE_BYTES;
        let first = waiting.min(CONSOLE_BYTES - start) as usize;
        let (before, after) = self.buffer.split_at_mut(first);
        let copied = ram.read_slice(before, GuestAddress(BYTES + u64::from(start))).is_ok()
            && ram.read_slice(after, GuestAddress(BYTES)).is_ok();
        self.tail = head;
        let _ = ram.store(self.tail, TAIL, Ordering::Release);
        if copied {
            self.sink.write(&self.buffer);
        }
        waiting as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn file() -> File {
        File::from(memfd_create("console", MemfdFlags::CLOEXEC).unwrap())
    }

    fn contents(file: &File) -> (u64, Vec<u8>) {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes[..8], CONSOLE_MAGIC.to_le_bytes());
        (u64::from_le_bytes(bytes[8..16].try_into().unwrap()), bytes[16..].to_vec())
    }

    #[test]
    fn a_ring_file_keeps_the_last_bytes_and_goes_on_after_a_restart() {
        let file = file();
        let mut ring = RingFile::open(file.try_clone().unwrap(), 8).unwrap();
        ring.write(b"abcdef").unwrap();
        ring.write(b"ghij").unwrap();
        assert_eq!(contents(&file), (10, b"ijcdefgh".to_vec()));
        let mut ring = RingFile::open(file.try_clone().unwrap(), 8).unwrap();
        ring.write(b"0123456789ABC").unwrap();
        // Byte n lies at n % 8; of 23 bytes the last eight are 5 to C, the first of them byte 15.
        assert_eq!(contents(&file), (23, b"6789ABC5".to_vec()));
    }

    #[test]
    fn a_lying_head_costs_at_most_one_ring_of_bytes() {
        let ram = memory::map(16).unwrap();
        let mut console = Console::new(Sink::Nowhere);
        ram.write_slice(b"hello", GuestAddress(BYTES)).unwrap();
        ram.store(5u32, HEAD, Ordering::Release).unwrap();
        assert_eq!(console.drain(&ram), 5);
        assert_eq!(ram.load::<u32>(TAIL, Ordering::Acquire).unwrap(), 5);
        ram.store(0x8000_0000u32, HEAD, Ordering::Release).unwrap();
        assert_eq!(console.drain(&ram), CONSOLE_BYTES as usize);
        ram.store(3u32, HEAD, Ordering::Release).unwrap();
        assert_eq!(console.drain(&ram), CONSOLE_BYTES as usize);
    }

    #[test]
    fn output_that_wraps_arrives_in_order() {
        let ram = memory::map(16).unwrap();
        let file = file();
        let ring = RingFile::open(file.try_clone().unwrap(), 64).unwrap();
        let mut console = Console::new(Sink::Ring(ring));
        console.tail = CONSOLE_BYTES - 3;
        ram.write_slice(b"abc", GuestAddress(BYTES + u64::from(CONSOLE_BYTES) - 3)).unwrap();
        ram.write_slice(b"def", GuestAddress(BYTES)).unwrap();
        ram.store(CONSOLE_BYTES + 3, HEAD, Ordering::Release).unwrap();
        assert_eq!(console.drain(&ram), 6);
        assert_eq!(contents(&file).1, b"abcdef");
    }
}
