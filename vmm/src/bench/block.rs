//! The same load on a disk twice: by a guest through its virtio-blk, and by io_uring on the file
//! itself.

use super::{BenchError, Image, Running, config, memory_file};
use crate::config::{Console, DiskConfig, DiskSource, Resource};
use crate::spawner::Client;
use io_uring::{IoUring, opcode, squeue, types};
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

/// Serial number of the disk under load.
pub const SERIAL: &str = "load";
/// What direct I/O wants of addresses, whatever the disk.
const ALIGN: usize = 4096;
const CONSOLE_BYTES: u64 = 64 << 10;

/// What is asked of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Writes (otherwise reads).
    pub write: bool,
    /// Anywhere (otherwise one after another from the start).
    pub random: bool,
    /// Bytes of each request.
    pub bytes: u32,
    /// Requests at once.
    pub depth: u32,
    /// How long.
    pub length: Duration,
}

/// What a load came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Requests that ended.
    pub operations: u64,
    /// From the first one's start to the last one's end.
    pub nanos: u64,
}

impl Done {
    /// Requests a second.
    pub fn per_second(self) -> f64 {
        self.operations as f64 * 1e9 / self.nanos.max(1) as f64
    }
}

impl Load {
    /// The step list for the built-in guest.
    pub fn steps(&self) -> String {
        format!(
            "#trine-steps\ndisk-wait {SERIAL} timeout=5\n\
             disk-load {SERIAL} {} order={} bytes={} depth={} seconds={:.6}\npoweroff\n",
            if self.write { "write" } else { "read" },
            if self.random { "random" } else { "sequential" },
            self.bytes,
            self.depth,
            self.length.as_secs_f64(),
        )
    }
}

/// Has a guest (the built-in one) make the load that its config drive `drive` lists.
pub fn in_guest(
    spawner: &Client,
    image: Image<'_>,
    drive: &File,
    disk: &File,
) -> Result<Done, BenchError> {
    let console = memory_file("console", 0)?;
    let mut config = config(image);
    config.console = Some(Console { file: Resource::Descriptor(2), capacity_bytes: CONSOLE_BYTES });
    let plugged = |id: &str, index, read_only| DiskConfig {
        read_only,
        ..DiskConfig::new(id, DiskSource::Raw(Resource::Descriptor(index)), id)
    };
    config.disks = vec![plugged("drive", 3, true), plugged(SERIAL, 4, false)];
    let record = memory_file("exit-record", 0)?;
    let descriptors =
        [image.kernel.as_fd(), record.as_fd(), console.as_fd(), drive.as_fd(), disk.as_fd()];
    let guest = spawner.spawn(&config, &descriptors)?;
    Running { guest, record, memory_mib: image.memory_mib, _plugged: Vec::new() }.wait()?;
    let said = read_console(console)?;
    parse(&said).ok_or_else(|| BenchError::NoMark(format!("it said: {said}")))
}

fn read_console(mut console: File) -> io::Result<String> {
    let mut said = Vec::new();
    console.seek(SeekFrom::Start(crate::config::CONSOLE_HEADER_BYTES))?;
    console.read_to_end(&mut said)?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// The figures in `… disk-load ok N operations in N ns`.
fn parse(said: &str) -> Option<Done> {
    let line = said.lines().find_map(|line| line.split_once("disk-load ok "))?.1;
    let mut words = line.split_ascii_whitespace();
    let operations = words.next()?.parse().ok()?;
    let nanos = words.nth(2)?.parse().ok()?;
    Some(Done { operations, nanos })
}

/// Makes the load on the file itself by io_uring.
pub fn on_host(file: &File, load: Load) -> Result<Done, BenchError> {
    let size = file.metadata()?.len();
    let blocks = size / u64::from(load.bytes.max(1));
    let is_whole = load.bytes > 0 && (load.bytes as usize).is_multiple_of(ALIGN);
    if blocks == 0 || load.depth == 0 || !is_whole {
        let message = format!("a load of {load:?} on {size} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message).into());
    }
    let mut ring = IoUring::new(load.depth)?;
    let buffers: Vec<Buffer> = (0..load.depth).map(|_| Buffer::new(load.bytes)).collect();
    let mut run = Run { file, load, places: Places::new(blocks, load.random), buffers: &buffers };
    let driven = run.drive(&mut ring);
    if driven.is_err() {
        // The kernel may still use the buffers of what is under way.
        std::mem::forget(buffers);
    }
    Ok(driven?)
}

/// A load under way on the host.
struct Run<'a> {
    file: &'a File,
    load: Load,
    places: Places,
    buffers: &'a [Buffer],
}

impl Run<'_> {
    fn drive(&mut self, ring: &mut IoUring) -> io::Result<Done> {
        let start = Instant::now();
        for index in 0..self.buffers.len() {
            self.submit(ring, index)?;
        }
        let (mut operations, mut under_way) = (0, self.buffers.len());
        let mut ended = Vec::with_capacity(under_way);
        while under_way > 0 {
            match ring.submit_and_wait(1) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                submitted => submitted?,
            };
            ended.extend(ring.completion().map(|entry| (entry.user_data(), entry.result())));
            for (index, result) in ended.drain(..) {
                if result != self.load.bytes as i32 {
                    return Err(io::Error::other(format!("a request ended with {result}")));
                }
                operations += 1;
                if start.elapsed() < self.load.length {
                    self.submit(ring, index as usize)?;
                } else {
                    under_way -= 1;
                }
            }
        }
        Ok(Done { operations, nanos: start.elapsed().as_nanos() as u64 })
    }

    fn submit(&mut self, ring: &mut IoUring, index: usize) -> io::Result<()> {
        let offset = self.places.next() * u64::from(self.load.bytes);
        let (fd, at) = (types::Fd(self.file.as_raw_fd()), self.buffers[index].at);
        let entry: squeue::Entry = if self.load.write {
            opcode::Write::new(fd, at, self.load.bytes).offset(offset).build()
        } else {
            opcode::Read::new(fd, at, self.load.bytes).offset(offset).build()
        };
        // SAFETY: the buffer is as long as asked for, one request at a time uses it, and it is
        // freed only when all have ended; the file stays open.
        let pushed = unsafe { ring.submission().push(&entry.user_data(index as u64)) };
        pushed.map_err(|_| io::Error::other("io_uring's queue is full"))
    }
}

/// Page-aligned memory.
struct Buffer {
    at: *mut u8,
    layout: Layout,
}

impl Buffer {
    fn new(bytes: u32) -> Buffer {
        let layout = Layout::from_size_align(bytes.max(1) as usize, ALIGN)
            .expect("a u32 of bytes in whole pages fits an address space");
        // SAFETY: the size is above 0.
        let at = unsafe { alloc(layout) };
        if at.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: as long as the layout; written once, so that no read meets fresh pages.
        unsafe { at.write_bytes(0x5A, layout.size()) };
        Buffer { at, layout }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.at, self.layout) }
    }
}

/// Which block is asked for next: as the built-in guest does it.
struct Places {
    blocks: u64,
    next: u64,
    random: bool,
    state: u64,
}

impl Places {
    fn new(blocks: u64, random: bool) -> Places {
        Places { blocks, next: 0, random, state: crate::machine::vcpu::host_tsc() | 1 }
    }

    fn next(&mut self) -> u64 {
        if !self.random {
            let block = self.next;
            self.next = (block + 1) % self.blocks;
            return block;
        }
        // xorshift64 (Marsaglia 2003).
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % self.blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_figures_are_read_from_its_console() {
        let said = "trine: booted 0.1.0\ntrine: step 2 disk-load ok 812 operations in 20012 ns\n";
        assert_eq!(parse(said), Some(Done { operations: 812, nanos: 20_012 }));
        assert_eq!(parse("trine: step 2 disk-load failed I/O error\n"), None);
    }

    #[test]
    fn a_load_on_a_file_moves_its_bytes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let length = Duration::from_millis(20);
        let load = Load { write: true, random: false, bytes: 4096, depth: 8, length };
        let done = on_host(&file, load).unwrap();
        assert!(done.operations >= 8 && done.per_second() > 0.0, "{done:?}");
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes).unwrap();
        let written = bytes.iter().filter(|byte| **byte == 0x5A).count() as u64;
        assert_eq!(written, done.operations.min(256) * 4096);
        let read = Load { write: false, random: true, ..load };
        assert!(on_host(&file, read).unwrap().operations >= 8);
        assert!(on_host(&file, Load { depth: 0, ..load }).is_err());
    }
}
