//! PCI bus 0 as the guest sees it: configuration space (ECAM), BARs, and the hot-plug controller
//! of `abi::boot`.
//!
//! Every access is a vCPU's exit and takes the bus lock; data never passes here (doorbells are
//! ioeventfds, interrupts are sent by device threads). Slot 0 is the host bridge; a device takes
//! the lowest free slot.

pub mod config_space;
pub mod function;
pub mod msix;
pub mod registers;

use crate::config::RateLimits;
use crate::control::metrics::DeviceMetrics;
use crate::devices::balloon::link::BalloonLink;
use crate::devices::blk::link::DiskLink;
use crate::devices::orders::Orders;
use crate::devices::{Device, DeviceKind, balloon};
use crate::machine::Interrupts;
use crate::machine::ioapic::IoApic;
use crate::machine::memory::Ram;
use abi::boot::{
    DeviceEntry, HOTPLUG_REG_DOWN, HOTPLUG_REG_EJECT, HOTPLUG_REG_UP, HOTPLUG_SIZE, HOTPLUG_START,
    HOTPLUG_VECTOR, PCI_ECAM_SIZE, PCI_ECAM_START, PCI_MMIO_PER_SLOT, PCI_MMIO_START, PCI_SLOTS,
};
use config_space::ConfigSpace;
use function::{Function, Retired};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

const MSI_ADDRESS: u64 = 0xFEE0_0000;
/// The port that takes the address of configuration mechanism 1 (PCI 3.0, section 3.2.2.3.2): Linux
/// looks for it before it has read the ACPI tables.
const PORT_CONFIG_ADDRESS: u16 = 0xCF8;
/// First of the four ports of its data.
const PORT_CONFIG_DATA: u16 = 0xCFC;
const CONFIG_ENABLE: u32 = 1 << 31;

/// How often it is looked whether a device that was taken away is closed.
const CLOSING_LOOK: Duration = Duration::from_millis(1);

/// Why a device could not be plugged or taken away.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlugError {
    /// Another device has this id.
    #[error("device {0:?} exists")]
    Exists(String),
    /// No device that can be pulled out has this id.
    #[error("no disk or network device {0:?} is plugged")]
    Unknown(String),
    /// No device has this id.
    #[error("no {1} {0:?} is plugged")]
    NotFound(String, DeviceKind),
    /// Every slot is taken.
    #[error("all {} slots are taken", PCI_SLOTS - 1)]
    Full,
    /// It is a disk on this host.
    #[error("disk {0:?} has no connection that could be replaced: its bytes are on this host")]
    NotRemote(String),
    /// The guest did not let go of it.
    #[error("the guest did not let go of {0:?} within {1} s")]
    GuestRefused(String, u64),
    /// A device's thread did not come to rest.
    #[error("device {0:?} has requests in flight that did not end in time; the guest runs on")]
    Busy(String),
    /// The host failed.
    #[error("plug {0:?}: {1}")]
    Host(String, String),
}

/// Bus 0, shared by vCPUs and control threads.
pub struct Bus {
    state: Mutex<State>,
    ejected: Condvar,
    interrupts: Interrupts,
    /// Where changes are announced, unless by the vector that a unikernel expects.
    line: OnceLock<(Arc<IoApic>, u8)>,
    ram: Ram,
}

struct State {
    bridge: ConfigSpace,
    slots: [Option<Function>; PCI_SLOTS],
    up: u32,
    down: u32,
    /// When the guest was first asked for the device of a slot, CLOCK_REALTIME.
    asked_at: [Option<SystemTime>; PCI_SLOTS],
    config_address: u32,
    retired: Vec<(String, DeviceKind, Retired)>,
}

/// Ids on the bus.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plugged {
    /// Disks.
    pub disks: Vec<String>,
    /// Disks the guest was asked for, or whose host side is still closing.
    pub disks_leaving: Vec<String>,
    /// Remote disks that wait for another connection.
    pub disks_disconnected: Vec<String>,
    /// Network devices.
    pub nets: Vec<String>,
    /// Devices that the guest was asked for and has not let go of, and since when.
    pub unplugging: Vec<(String, SystemTime)>,
}

impl Bus {
    /// A bus with nothing but its bridge.
    pub fn new(ram: Ram, interrupts: Interrupts) -> Bus {
        let state = State {
            bridge: ConfigSpace::host_bridge(),
            slots: [const { None }; PCI_SLOTS],
            up: 0,
            down: 0,
            asked_at: [None; PCI_SLOTS],
            config_address: 0,
            retired: Vec::new(),
        };
        let line = OnceLock::new();
        Bus { state: Mutex::new(state), ejected: Condvar::new(), interrupts, line, ram }
    }

    /// Announces changes by a pulse on a pin, as ACPI's tables say, instead of by
    /// [`HOTPLUG_VECTOR`]. Called before the guest runs.
    pub fn announce_on(&self, ioapic: Arc<IoApic>, pin: u8) {
        let _ = self.line.set((ioapic, pin));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Plugs a device before the guest runs.
    pub fn add_at_boot(&self, device: Device) -> Result<DeviceEntry, PlugError> {
        let mut state = self.lock();
        let slot = self.place(&mut state, device, true)?;
        let function = state.slots[slot].as_ref().ok_or(PlugError::Full)?;
        Ok(function.table_entry(slot as u16))
    }

    /// Plugs a device into the running guest and tells it.
    pub fn add(&self, device: Device) -> Result<(), PlugError> {
        let mut state = self.lock();
        let slot = self.place(&mut state, device, false)?;
        state.up |= 1 << slot;
        drop(state);
        self.announce();
        Ok(())
    }

    fn place(&self, state: &mut State, device: Device, at_boot: bool) -> Result<usize, PlugError> {
        let id = device.id.clone();
        state.retired.retain(|(_, _, retired)| !retired.is_closed());
        let known = state.slots.iter().flatten().any(|function| function.id == id);
        if known || state.retired.iter().any(|(old, _, _)| *old == id) {
            return Err(PlugError::Exists(id));
        }
        let slot =
            (1..PCI_SLOTS).find(|slot| state.slots[*slot].is_none()).ok_or(PlugError::Full)?;
        let bar = PCI_MMIO_START + slot as u64 * PCI_MMIO_PER_SLOT;
        let function =
            Function::new(device, bar, at_boot, self.ram.clone(), self.interrupts.clone())
                .map_err(|error| PlugError::Host(id, error.to_string()))?;
        state.slots[slot] = Some(function);
        Ok(slot)
    }

    fn announce(&self) {
        match self.line.get() {
            Some((ioapic, pin)) => ioapic.pulse(*pin),
            None => self.interrupts.signal(MSI_ADDRESS, u32::from(HOTPLUG_VECTOR)),
        }
    }

    /// Asks the guest for a device and waits until it let go and the host side is closed.
    ///
    /// # Errors
    /// [`PlugError::GuestRefused`] after `timeout`; the guest stays asked, and may let go later.
    pub fn remove(&self, id: &str, kind: DeviceKind, timeout: Duration) -> Result<(), PlugError> {
        let mut state = self.lock();
        let slot = (1..PCI_SLOTS).find(|slot| {
            state.slots[*slot]
                .as_ref()
                .is_some_and(|function| function.id == id && function.kind == kind)
        });
        if let Some(slot) = slot {
            state.down |= 1 << slot;
            state.asked_at[slot].get_or_insert_with(SystemTime::now);
            self.announce();
            let still_there = |state: &mut State| {
                state.slots[slot].as_ref().is_some_and(|function| function.id == id)
            };
            let waited = self.ejected.wait_timeout_while(state, timeout, still_there);
            let (after, result) = waited.unwrap_or_else(PoisonError::into_inner);
            if result.timed_out() {
                return Err(PlugError::GuestRefused(id.into(), timeout.as_secs()));
            }
            state = after;
        }
        let retired =
            state.retired.iter().position(|(old, old_kind, _)| old == id && *old_kind == kind);
        match (retired, slot) {
            (Some(index), _) => {
                let (_, _, retired) = state.retired.swap_remove(index);
                drop(state);
                retired.wait();
                Ok(())
            }
            (None, Some(_)) => Ok(()),
            (None, None) => Err(PlugError::NotFound(id.into(), kind)),
        }
    }

    /// Takes a disk or network device away whether the guest lets go of it or not: it is as if the
    /// device had been pulled out. Returns when its host side is closed.
    pub fn force_remove(&self, id: &str) -> Result<(), PlugError> {
        let mut state = self.lock();
        let plugged = |function: &Function| {
            function.id == id && matches!(function.kind, DeviceKind::Disk | DeviceKind::Net)
        };
        let slot = (1..PCI_SLOTS).find(|slot| state.slots[*slot].as_ref().is_some_and(plugged));
        let Some(slot) = slot else {
            let removing = state.retired.iter().position(|(old, _, _)| old == id);
            let Some(index) = removing else { return Err(PlugError::Unknown(id.into())) };
            let (_, _, retired) = state.retired.swap_remove(index);
            drop(state);
            retired.wait();
            return Ok(());
        };
        let retired = state.take_out(slot);
        drop(state);
        self.ejected.notify_all();
        if let Some((_, _, retired)) = retired {
            retired.wait();
        }
        Ok(())
    }

    /// Brings every device's thread to rest: with the vCPUs stopped, nothing of the guest's memory
    /// or of its disks changes from here.
    ///
    /// # Errors
    /// [`PlugError::Busy`] after `patience`; every device serves on.
    pub fn hold(&self, patience: Duration) -> Result<(), PlugError> {
        let deadline = Instant::now() + patience;
        let devices = self.orders();
        devices.iter().for_each(|(_, orders)| orders.hold());
        let busy = devices.iter().find(|(_, orders)| !orders.wait_until_held(deadline));
        let busy = match busy {
            Some((id, _)) => Some(id.clone()),
            None => self.still_closing(deadline),
        };
        match busy {
            None => Ok(()),
            Some(id) => {
                devices.iter().for_each(|(_, orders)| orders.go_on());
                Err(PlugError::Busy(id))
            }
        }
    }

    /// Orders of every device's thread.
    fn orders(&self) -> Vec<(String, Arc<Orders>)> {
        let state = self.lock();
        let plugged = state.slots.iter().flatten();
        plugged
            .filter_map(|function| Some((function.id.clone(), Arc::clone(function.orders()?))))
            .collect()
    }

    /// Waits for devices that were taken away; one whose thread has not ended by `deadline`.
    fn still_closing(&self, deadline: Instant) -> Option<String> {
        loop {
            let mut state = self.lock();
            state.retired.retain(|(_, _, retired)| !retired.is_closed());
            let (id, _, _) = state.retired.first()?;
            if Instant::now() >= deadline {
                return Some(id.clone());
            }
            drop(state);
            std::thread::sleep(CLOSING_LOOK);
        }
    }

    /// Lets every device's thread serve again.
    pub fn go_on(&self) {
        self.orders().iter().for_each(|(_, orders)| orders.go_on());
    }

    /// What is plugged.
    pub fn plugged(&self) -> Plugged {
        let mut state = self.lock();
        state.retired.retain(|(_, _, retired)| !retired.is_closed());
        let mut plugged = Plugged::default();
        for (slot, function) in state.slots.iter().enumerate() {
            let Some(function) = function else { continue };
            if let Some(since) = state.asked_at[slot] {
                plugged.unplugging.push((function.id.clone(), since));
            }
            match function.kind {
                DeviceKind::Rng | DeviceKind::Balloon | DeviceKind::Vsock => {}
                DeviceKind::Net => plugged.nets.push(function.id.clone()),
                DeviceKind::Disk => {
                    plugged.disks.push(function.id.clone());
                    if function.link.as_ref().is_some_and(|link| link.is_lost()) {
                        plugged.disks_disconnected.push(function.id.clone());
                    }
                    if state.down & 1 << slot != 0 {
                        plugged.disks_leaving.push(function.id.clone());
                    }
                }
            }
        }
        let closing = state.retired.iter().filter(|(_, kind, _)| *kind == DeviceKind::Disk);
        plugged.disks_leaving.extend(closing.map(|(id, _, _)| id.clone()));
        plugged
    }

    /// What its disks and network devices did.
    pub fn metrics(&self) -> Vec<DeviceMetrics> {
        let state = self.lock();
        let plugged = state.slots.iter().enumerate();
        let measured = plugged.filter_map(|(slot, function)| {
            let function = function.as_ref()?;
            let kind = match function.kind {
                DeviceKind::Disk => "disk",
                DeviceKind::Net => "net",
                DeviceKind::Rng | DeviceKind::Balloon | DeviceKind::Vsock => return None,
            };
            Some(DeviceMetrics {
                id: function.id.clone(),
                kind: kind.into(),
                counts: function.counters.counts(),
                unplugging: state.down & 1 << slot != 0,
            })
        });
        measured.collect()
    }

    /// The connection of a remote disk.
    pub fn disk_link(&self, id: &str) -> Result<Arc<DiskLink>, PlugError> {
        let state = self.lock();
        let mut disks = state.slots.iter().flatten().filter(|it| it.kind == DeviceKind::Disk);
        let disk = disks.find(|function| function.id == id);
        let disk = disk.ok_or_else(|| PlugError::NotFound(id.into(), DeviceKind::Disk))?;
        disk.link.clone().ok_or_else(|| PlugError::NotRemote(id.into()))
    }

    /// The balloon.
    pub fn balloon(&self) -> Result<Arc<BalloonLink>, PlugError> {
        self.lock().balloon().map(|(_, link)| link)
    }

    /// Asks the guest to give `mib` of its memory to the host in all, or to take back the rest.
    pub fn set_balloon(&self, mib: u32) -> Result<(), PlugError> {
        let state = self.lock();
        let (function, link) = state.balloon()?;
        link.set_target(mib);
        function.announce_config();
        Ok(())
    }

    /// Changes a device's rate limits, in the order of [`Device::rates`].
    pub fn set_rates(
        &self,
        id: &str,
        kind: DeviceKind,
        limits: &[RateLimits],
    ) -> Result<(), PlugError> {
        let state = self.lock();
        let mut all = state.slots.iter().flatten();
        let function = all.find(|function| function.kind == kind && function.id == id);
        function.ok_or_else(|| PlugError::NotFound(id.into(), kind))?.set_rates(limits);
        Ok(())
    }

    /// The packet ring descriptors of a network device.
    pub fn ring(&self, id: &str) -> Result<[std::os::fd::OwnedFd; 3], PlugError> {
        let state = self.lock();
        let function = state.slots.iter().flatten().find(|function| function.id == id);
        let region = function
            .and_then(|function| function.ring.as_ref())
            .ok_or_else(|| PlugError::NotFound(id.into(), DeviceKind::Net))?;
        region.descriptors().map_err(|error| PlugError::Host(id.into(), error.to_string()))
    }

    /// A vCPU reads; addresses that nothing decodes keep what `data` holds (all ones).
    pub fn read(&self, address: u64, data: &mut [u8]) {
        let mut state = self.lock();
        if let Some(offset) = inside(address, PCI_ECAM_START, PCI_ECAM_SIZE) {
            state.ecam_read(offset, data);
        } else if let Some(offset) = inside(address, HOTPLUG_START, HOTPLUG_SIZE) {
            let value = match offset {
                HOTPLUG_REG_UP => std::mem::take(&mut state.up),
                HOTPLUG_REG_DOWN => state.down,
                _ => 0,
            };
            let bytes = value.to_le_bytes();
            for (byte, value) in data.iter_mut().zip(bytes.into_iter().chain(std::iter::repeat(0)))
            {
                *byte = value;
            }
        } else if let Some((function, offset)) = state.decode(address) {
            function.bar_read(offset, data);
        }
    }

    /// A vCPU writes; addresses that nothing decodes take no notice.
    pub fn write(&self, address: u64, data: &[u8]) {
        let mut state = self.lock();
        if let Some(offset) = inside(address, PCI_ECAM_START, PCI_ECAM_SIZE) {
            state.ecam_write(offset, data);
        } else if let Some(offset) = inside(address, HOTPLUG_START, HOTPLUG_SIZE) {
            if let (HOTPLUG_REG_EJECT, Ok(bits)) = (offset, <[u8; 4]>::try_from(data)) {
                state.eject(u32::from_le_bytes(bits));
                drop(state);
                self.ejected.notify_all();
            }
        } else if let Some((function, offset)) = state.decode(address) {
            function.bar_write(offset, data);
        }
    }
}

/// What configuration mechanism 1 does with a port.
enum ConfigPort {
    Address,
    /// An offset in the ECAM window.
    Data(u64),
    Nothing,
}

impl Bus {
    /// A vCPU reads a port; ports that nothing decodes keep what `data` holds (all ones).
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        let mut state = self.lock();
        match state.config_port(port, data.len()) {
            ConfigPort::Address => data.copy_from_slice(&state.config_address.to_le_bytes()),
            ConfigPort::Data(offset) => state.ecam_read(offset, data),
            ConfigPort::Nothing => {}
        }
    }

    /// A vCPU writes a port.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        let mut state = self.lock();
        match (state.config_port(port, data.len()), <[u8; 4]>::try_from(data)) {
            (ConfigPort::Address, Ok(address)) => {
                state.config_address = u32::from_le_bytes(address)
            }
            (ConfigPort::Data(offset), _) => state.ecam_write(offset, data),
            _ => {}
        }
    }
}

enum Target<'a> {
    Bridge(&'a mut ConfigSpace),
    Function(&'a mut Function),
}

impl State {
    fn config_port(&self, port: u16, len: usize) -> ConfigPort {
        let data = port.checked_sub(PORT_CONFIG_DATA).map(usize::from);
        match (port, data) {
            (PORT_CONFIG_ADDRESS, _) if len == 4 => ConfigPort::Address,
            (_, Some(within)) if within + len <= 4 && self.config_address & CONFIG_ENABLE != 0 => {
                // Bus, device, function and register, as ECAM has them but for 4 bits of space.
                let function = u64::from(self.config_address >> 8 & 0xFFFF);
                let register = u64::from(self.config_address & 0xFC) + within as u64;
                let offset = function << 12 | register;
                if offset < PCI_ECAM_SIZE { ConfigPort::Data(offset) } else { ConfigPort::Nothing }
            }
            _ => ConfigPort::Nothing,
        }
    }

    fn ecam_read(&mut self, offset: u64, data: &mut [u8]) {
        self.ecam(offset, |target, register| match target {
            Target::Bridge(bridge) => bridge.read(register, data),
            Target::Function(function) => function.config_read(register, data),
        });
    }

    fn ecam_write(&mut self, offset: u64, data: &[u8]) {
        self.ecam(offset, |target, register| match target {
            Target::Bridge(bridge) => bridge.write(register, data),
            Target::Function(function) => function.config_write(register, data),
        });
    }

    fn ecam(&mut self, offset: u64, access: impl FnOnce(Target<'_>, usize)) {
        const SLOT_BYTES: u64 = 0x8000;
        const FUNCTION_BYTES: u64 = 0x1000;
        let slot = (offset / SLOT_BYTES) as usize;
        let within = offset % SLOT_BYTES;
        if within >= FUNCTION_BYTES {
            return;
        }
        if slot == 0 {
            access(Target::Bridge(&mut self.bridge), within as usize);
        } else if let Some(function) = self.slots.get_mut(slot).and_then(Option::as_mut) {
            access(Target::Function(function), within as usize);
        }
    }

    fn decode(&mut self, address: u64) -> Option<(&mut Function, u64)> {
        let slot = self.slots.iter().position(|function| {
            function.as_ref().is_some_and(|function| function.decodes(address).is_some())
        })?;
        let function = self.slots[slot].as_mut()?;
        let offset = function.decodes(address)?;
        Some((function, offset))
    }

    fn balloon(&self) -> Result<(&Function, Arc<BalloonLink>), PlugError> {
        let found = self.slots.iter().flatten().find_map(|function| {
            function.balloon.as_ref().map(|link| (function, Arc::clone(link)))
        });
        found.ok_or_else(|| PlugError::NotFound(balloon::ID.into(), DeviceKind::Balloon))
    }

    /// The guest let go of slots; only those it was asked for count.
    fn eject(&mut self, bits: u32) {
        for slot in 1..PCI_SLOTS {
            if bits & self.down & 1 << slot == 0 {
                continue;
            }
            let taken = self.take_out(slot);
            self.retired.extend(taken);
        }
    }

    /// Empties a slot; the device's thread ends by itself.
    fn take_out(&mut self, slot: usize) -> Option<(String, DeviceKind, Retired)> {
        self.down &= !(1 << slot);
        self.up &= !(1 << slot);
        self.asked_at[slot] = None;
        let function = self.slots[slot].take()?;
        let (id, kind) = (function.id.clone(), function.kind);
        Some((id, kind, function.retire()))
    }
}

fn inside(address: u64, start: u64, size: u64) -> Option<u64> {
    address.checked_sub(start).filter(|offset| *offset < size)
}
