//! Everything outside the program, and the one place where the guest waits.
//!
//! Whoever waits for something calls [`World::turn`] until it is there:
//! ```text
//! turn: forget old interrupts → hot-plug → network (ARP, ICMP, DHCP, HTTP) → disks
//!       something happened? return
//!       else: ask every device for an interrupt → halt until one, or the nearest deadline
//! ```

use crate::disks::Disk;
use crate::network::{Generation, Network};
use abi::boot::DeviceEntry;
use alloc::vec::Vec;
use runtime::clock::{self, Instant};
use runtime::virtio::blk::BlockDevice;
use runtime::virtio::net::NetDevice;
use runtime::virtio::{TYPE_BLOCK, TYPE_NET, Transport};
use runtime::{hotplug, interrupts, println};

/// The guest's devices.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) network: Option<Network>,
    pub(crate) disks: Vec<Disk>,
    /// Slots whose device the host wants back and that is still busy.
    leaving: u32,
    /// Of the last network device.
    generation: Generation,
}

impl World {
    /// Starts the network devices of the table: the first one is used.
    pub(crate) fn open_networks(&mut self, devices: &[DeviceEntry]) {
        self.open(devices, TYPE_NET);
        if let Some(network) = &mut self.network {
            network.poll(clock::now());
        }
    }

    /// Starts the disks of the table.
    pub(crate) fn open_disks(&mut self, devices: &[DeviceEntry]) {
        self.open(devices, TYPE_BLOCK);
    }

    fn open(&mut self, devices: &[DeviceEntry], virtio_type: u16) {
        for entry in devices.iter().filter(|entry| entry.virtio_type == virtio_type) {
            if let Some(transport) = Transport::from_entry(entry) {
                self.add(transport);
            }
        }
    }

    fn add(&mut self, transport: Transport) {
        let (slot, kind) = (transport.slot(), transport.virtio_type());
        let failure = match kind {
            TYPE_NET if self.network.is_none() => match NetDevice::open(transport) {
                Ok(device) => {
                    self.network = Some(Network::new(device, self.generation.advance()));
                    return;
                }
                Err(error) => error,
            },
            TYPE_BLOCK => match BlockDevice::open(transport) {
                Ok(device) => {
                    self.disks.push(Disk::new(device));
                    return;
                }
                Err(error) => error,
            },
            _ => return,
        };
        println!("trine: device in slot {slot} not used: {failure}");
    }

    /// Serves everything once; where nothing happened, halts until something does or the
    /// deadline is reached. It may return early: callers check their condition and call again.
    pub(crate) fn turn(&mut self, deadline: Option<Instant>) {
        interrupts::clear();
        let mut active = self.serve_hotplug();
        let now = clock::now();
        let mut nearest = deadline;
        if let Some(network) = &mut self.network {
            active |= network.poll(now);
            nearest = [deadline, network.next_deadline(now)].into_iter().flatten().min();
        }
        for disk in &mut self.disks {
            active |= disk.poll();
        }
        if !active && self.arm() {
            interrupts::halt_until(nearest);
        }
    }

    fn arm(&mut self) -> bool {
        let network_idle = self.network.as_mut().is_none_or(Network::arm);
        self.disks.iter_mut().fold(network_idle, |idle, disk| disk.arm() && idle)
    }

    fn serve_hotplug(&mut self) -> bool {
        if interrupts::take_hotplug() {
            self.look_for_changes();
            return true;
        }
        if self.leaving != 0 {
            self.let_go();
        }
        false
    }

    /// Asks the hot-plug controller what came and what shall go.
    pub(crate) fn look_for_changes(&mut self) {
        self.leaving = hotplug::leaving();
        self.let_go();
        for slot in hotplug::slots(hotplug::take_plugged()) {
            if !self.is_known(slot)
                && let Some(transport) = hotplug::probe(slot)
            {
                self.add(transport);
            }
        }
    }

    fn is_known(&self, slot: u16) -> bool {
        self.disks.iter().any(|disk| disk.slot() == slot)
            || self.network.as_ref().is_some_and(|network| network.slot() == slot)
    }

    /// Gives back what the host asked for, except a disk with a request under way.
    fn let_go(&mut self) {
        for slot in hotplug::slots(self.leaving) {
            if self.disks.iter().any(|disk| disk.slot() == slot && disk.is_busy()) {
                continue;
            }
            self.disks.retain(|disk| disk.slot() != slot);
            if self.network.as_ref().is_some_and(|network| network.slot() == slot) {
                self.network = None;
            }
            hotplug::eject(slot);
            self.leaving &= !(1 << slot);
        }
    }

    /// The network that a socket was made in, if that is still the one.
    pub(crate) fn network_of(
        &mut self,
        generation: Generation,
    ) -> Result<&mut Network, &'static str> {
        let same = |network: &&mut Network| network.generation() == generation;
        self.network.as_mut().filter(same).ok_or("the network device was taken away")
    }

    /// Serves everything until the deadline.
    pub(crate) fn wait_until(&mut self, deadline: Instant) {
        while clock::now() < deadline {
            self.turn(Some(deadline));
        }
    }
}
