//! virtio 1.2 over PCI: the modern transport, split virtqueues, network and block devices.
//!
//! The device is the host's: it is trusted not to corrupt the guest, but what it says is still
//! checked where a wrong value would be undefined behaviour here.

pub mod blk;
pub mod net;
pub mod queue;
mod transport;

pub use transport::{Doorbell, Transport, VirtioError};

/// Device type of a network device.
pub const TYPE_NET: u16 = 1;
/// Device type of a block device.
pub const TYPE_BLOCK: u16 = 2;
