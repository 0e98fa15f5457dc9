//! Disks, with requests that wait while the rest of the world is served.

use crate::world::World;
use alloc::string::String;
use core::fmt;
use inputs::iso9660::ReadAt;
use inputs::steps::{DiskLoad, Pattern};
use runtime::virtio::blk::{BlockDevice, BlockError, Load, LoadFigures, REQUEST_BYTES_MAX};

/// One disk.
pub(crate) struct Disk {
    device: BlockDevice,
    outcome: Option<Result<(), BlockError>>,
    serial: Option<String>,
}

impl Disk {
    pub(crate) fn new(device: BlockDevice) -> Disk {
        Disk { device, outcome: None, serial: None }
    }

    pub(crate) fn slot(&self) -> u16 {
        self.device.slot()
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }

    /// Has a request that the device, or whoever waits for it, is not done with.
    pub(crate) fn is_busy(&self) -> bool {
        self.device.is_busy() || self.outcome.is_some()
    }

    /// Takes the outcome of a request; `true` where there was one.
    pub(crate) fn poll(&mut self) -> bool {
        if !self.device.is_busy() {
            return false;
        }
        let outcome = self.device.poll();
        let ended = outcome.is_some();
        if ended {
            self.outcome = outcome;
        }
        ended
    }

    pub(crate) fn arm(&mut self) -> bool {
        self.device.arm()
    }
}

/// Why a disk could not be used.
#[derive(Debug)]
pub(crate) enum DiskError {
    /// It is not there (any more).
    Gone,
    /// A request failed.
    Request(BlockError),
    /// What was read is not what was written.
    Differs(u64),
}

impl From<BlockError> for DiskError {
    fn from(error: BlockError) -> Self {
        DiskError::Request(error)
    }
}

impl fmt::Display for DiskError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskError::Gone => out.write_str("the disk was taken away"),
            DiskError::Request(error) => error.fmt(out),
            DiskError::Differs(offset) => write!(out, "the byte at {offset} differs"),
        }
    }
}

impl World {
    pub(crate) fn disk(&mut self, slot: u16) -> Result<&mut Disk, DiskError> {
        self.disks.iter_mut().find(|disk| disk.slot() == slot).ok_or(DiskError::Gone)
    }

    /// Starts a request and waits for its end. `start` says whether there is one to wait for.
    fn request(
        &mut self,
        slot: u16,
        start: impl FnOnce(&mut BlockDevice) -> Result<bool, BlockError>,
    ) -> Result<(), DiskError> {
        if !start(&mut self.disk(slot)?.device)? {
            return Ok(());
        }
        loop {
            if let Some(outcome) = self.disk(slot)?.outcome.take() {
                return Ok(outcome?);
            }
            self.turn(None);
        }
    }

    /// The slot of the disk whose serial number starts so; it asks disks it does not know yet.
    pub(crate) fn find_disk(&mut self, serial: &str) -> Option<u16> {
        let slots: alloc::vec::Vec<u16> = self.disks.iter().map(Disk::slot).collect();
        slots
            .into_iter()
            .find(|slot| self.serial(*slot).is_ok_and(|found| found.starts_with(serial)))
    }

    fn serial(&mut self, slot: u16) -> Result<String, DiskError> {
        if let Some(serial) = &self.disk(slot)?.serial {
            return Ok(serial.clone());
        }
        let asked = self.request(slot, |device| device.start_serial().map(|()| true));
        let disk = self.disk(slot)?;
        // A disk that can't say its serial number has none; it is not asked again.
        let serial = if asked.is_ok() { disk.device.serial() } else { String::new() };
        disk.serial = Some(serial.clone());
        Ok(serial)
    }

    /// Writes the pattern and makes it durable.
    pub(crate) fn write_pattern(&mut self, slot: u16, pattern: &Pattern) -> Result<(), DiskError> {
        for (offset, bytes) in requests(0, pattern.bytes) {
            self.request(slot, |device| {
                device
                    .start_write(offset, bytes, |buffer| pattern.fill(offset, buffer))
                    .map(|()| true)
            })?;
        }
        self.request(slot, BlockDevice::start_flush)
    }

    /// Keeps the disk busy, and nothing else.
    pub(crate) fn load(&mut self, slot: u16, load: &DiskLoad) -> Result<LoadFigures, DiskError> {
        let load = Load {
            write: load.write,
            random: load.random,
            bytes: load.bytes as usize,
            depth: load.depth,
            micros: load.micros,
        };
        Ok(self.disk(slot)?.device.run_load(load)?)
    }

    /// Reads and compares.
    pub(crate) fn verify_pattern(&mut self, slot: u16, pattern: &Pattern) -> Result<(), DiskError> {
        for (offset, bytes) in requests(0, pattern.bytes) {
            self.request(slot, |device| device.start_read(offset, bytes).map(|()| true))?;
            let data = self.disk(slot)?.device.data();
            if let Some(at) = pattern.first_difference(offset, data) {
                return Err(DiskError::Differs(at));
            }
        }
        Ok(())
    }
}

/// A range as requests that a device takes.
fn requests(start: u64, bytes: u64) -> impl Iterator<Item = (u64, usize)> {
    let end = start.saturating_add(bytes);
    (start..end)
        .step_by(REQUEST_BYTES_MAX)
        .map(move |offset| (offset, (end - offset).min(REQUEST_BYTES_MAX as u64) as usize))
}

/// A disk as a source of an ISO 9660 volume.
pub(crate) struct DiskReader<'a> {
    pub(crate) world: &'a mut World,
    pub(crate) slot: u16,
}

impl ReadAt for DiskReader<'_> {
    type Error = DiskError;

    fn read_at(&mut self, start: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        for (offset, bytes) in requests(start, buffer.len() as u64) {
            self.world
                .request(self.slot, |device| device.start_read(offset, bytes).map(|()| true))?;
            let at = (offset - start) as usize;
            buffer[at..at + bytes].copy_from_slice(self.world.disk(self.slot)?.device.data());
        }
        Ok(())
    }
}
