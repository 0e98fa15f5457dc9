//! The other end of a network device: the switch's packet ring, or a TAP interface.

use crate::config::Resource;
use crate::devices::DeviceError;
use crate::process::resources::{Access, ResourceError, Supply};
use abi::packet_ring::{Consumer, Direction, Producer, Region};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

/// Where frames go and come from.
pub enum Link {
    /// The switch.
    Ring {
        /// Guest to switch.
        producer: Producer,
        /// Switch to guest.
        consumer: Consumer,
    },
    /// A TAP interface, without offloads.
    Tap(File),
}

impl Link {
    /// This side's ends of a packet ring.
    pub fn ring(region: &Region) -> io::Result<Link> {
        let producer = region.producer(Direction::FromGuest)?;
        let consumer = region.consumer(Direction::ToGuest)?;
        Ok(Link::Ring { producer, consumer })
    }

    /// A TAP interface by name, or its open descriptor.
    pub fn tap(
        resource: &Resource,
        supply: &mut Supply,
        what: &str,
    ) -> Result<Link, ResourceError> {
        let unusable = |reason: String| ResourceError::Unusable { what: what.into(), reason };
        let file = match resource {
            Resource::Descriptor(_) => supply.file(resource, Access::Write, what)?,
            Resource::Path(name) => {
                supply.only_paths(what)?;
                open_tap(name).map_err(|error| {
                    unusable(format!("TAP interface {}: {error}", name.display()))
                })?
            }
        };
        rustix::io::ioctl_fionbio(&file, true).map_err(|error| unusable(error.to_string()))?;
        Ok(Link::Tap(file))
    }

    /// Sends one frame; `false`: there was no room and it is lost.
    pub fn send(&mut self, frame: &[u8]) -> Result<bool, DeviceError> {
        match self {
            Link::Ring { producer, .. } => Ok(producer.push(frame)?),
            Link::Tap(file) => Ok(file.write(frame).is_ok()),
        }
    }

    /// Shows what was sent to the other side.
    pub fn flush(&mut self) -> Result<(), DeviceError> {
        match self {
            Link::Ring { producer, .. } => Ok(producer.publish()?),
            Link::Tap(_) => Ok(()),
        }
    }

    /// Takes one frame; returns its length.
    pub fn receive(&mut self, frame: &mut [u8]) -> Result<Option<usize>, DeviceError> {
        match self {
            Link::Ring { consumer, .. } => Ok(consumer.pop(frame)?),
            Link::Tap(file) => match file.read(frame) {
                Ok(0) => Ok(None),
                Ok(len) => Ok(Some(len)),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) =>
                {
                    Ok(None)
                }
                Err(error) => Err(error.into()),
            },
        }
    }

    /// Asks to be woken; `false`: something came meanwhile.
    pub fn prepare_sleep(&mut self) -> bool {
        match self {
            Link::Ring { consumer, .. } => consumer.prepare_sleep(),
            Link::Tap(_) => true,
        }
    }

    /// What becomes readable when a frame comes.
    pub fn event(&self) -> BorrowedFd<'_> {
        match self {
            Link::Ring { consumer, .. } => consumer.event().as_fd(),
            Link::Tap(file) => file.as_fd(),
        }
    }

    /// Called after a sleep.
    pub fn woken(&self) {
        if let Link::Ring { consumer, .. } = self {
            consumer.clear_event();
        }
    }
}

/// Opens a TAP interface by name.
pub fn open_tap(name: &Path) -> io::Result<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54CA;
    let bytes = name.as_os_str().as_encoded_bytes();
    // SAFETY: a zeroed ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if bytes.is_empty() || bytes.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a name has from 1 to 15 bytes"));
    }
    for (target, byte) in request.ifr_name.iter_mut().zip(bytes) {
        *target = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: the request is a valid ifreq and lives through the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw const request) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}
