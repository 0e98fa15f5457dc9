//! A virtio function on the bus: its registers, its interrupts and its device's thread.
//!
//! ```text
//!   Idle ──DRIVER_OK──▶ Active ──status = 0──▶ Idle
//!     │                   │
//!     └──── retire() ─────┴──▶ (gone; the device closes its host resources)
//! ```

use super::config_space::{self, BAR_BYTES, ConfigSpace, WINDOW_BYTES};
use super::msix::Msix;
use super::registers::{Change, Registers};
use crate::config::RateLimits;
use crate::devices::balloon::link::BalloonLink;
use crate::devices::blk::link::DiskLink;
use crate::devices::counters::Counters;
use crate::devices::fields::Fields;
use crate::devices::orders::Orders;
use crate::devices::rate::RateLink;
use crate::devices::{Backend, Device, DeviceKind, QueueInterrupt, Work};
use crate::machine::Interrupts;
use crate::machine::memory::Ram;
use crate::process::seccomp::{self, Role};
use abi::boot::DeviceEntry;
use abi::packet_ring::Region;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Stack of a device's thread.
const STACK_BYTES: usize = 256 << 10;

/// A virtio function.
pub struct Function {
    /// The device's id.
    pub id: String,
    /// Which kind of device.
    pub kind: DeviceKind,
    /// The packet ring of a network device that has one.
    pub ring: Option<Arc<Region>>,
    /// The connection of a remote disk.
    pub link: Option<Arc<DiskLink>>,
    /// The host's end of a balloon.
    pub balloon: Option<Arc<BalloonLink>>,
    /// What it did.
    pub counters: Arc<Counters>,
    /// Its rate limits.
    rates: Vec<Arc<RateLink>>,
    config: ConfigSpace,
    registers: Registers,
    device_config: Fields,
    queues_needed: usize,
    virtio_type: u16,
    vectors: u16,
    msix: Arc<Msix>,
    isr: Arc<AtomicU8>,
    failed: Arc<AtomicBool>,
    interrupts: Interrupts,
    ram: Ram,
    doorbell: EventFd,
    doorbell_at: Option<u64>,
    activation: Activation,
}

enum Activation {
    Idle(Box<dyn Backend>),
    Active(Worker),
    /// Its thread could not be started, or panicked.
    Broken,
}

struct Worker {
    orders: Arc<Orders>,
    retired: Arc<AtomicBool>,
    thread: JoinHandle<Option<Box<dyn Backend>>>,
}

/// A removed device whose host resources may still be in use until its thread has ended.
pub struct Retired(Option<JoinHandle<Option<Box<dyn Backend>>>>);

impl Retired {
    /// Whether everything is closed.
    pub fn is_closed(&self) -> bool {
        self.0.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until everything is closed.
    pub fn wait(self) {
        if let Some(thread) = self.0 {
            let _ = thread.join();
        }
    }
}

impl Function {
    /// Puts `device` at `bar`. `at_boot`: ready for a guest that relies on the device table.
    pub fn new(
        device: Device,
        bar: u64,
        at_boot: bool,
        ram: Ram,
        interrupts: Interrupts,
    ) -> std::io::Result<Function> {
        let vectors = device.queue_sizes.len() as u16 + 1;
        let mut config = ConfigSpace::virtio(device.virtio_type, bar, vectors);
        let msix = Msix::new(interrupts.clone(), vectors);
        if at_boot {
            config.enable_msix();
            msix.set_control(config.msix());
        }
        Ok(Function {
            id: device.id,
            kind: device.kind,
            ring: device.ring,
            link: device.link,
            balloon: device.balloon,
            counters: Arc::default(),
            rates: device.rates,
            config,
            registers: Registers::new(device.features, &device.queue_sizes),
            device_config: device.config,
            queues_needed: device.queues_needed,
            virtio_type: device.virtio_type,
            vectors,
            msix: Arc::new(msix),
            isr: Arc::default(),
            failed: Arc::default(),
            interrupts,
            ram,
            doorbell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            doorbell_at: None,
            activation: Activation::Idle(device.backend),
        })
    }

    /// Its entry in the boot parameters' device table.
    pub fn table_entry(&self, slot: u16) -> DeviceEntry {
        DeviceEntry {
            bar: self.config.bar().unwrap_or(0),
            slot,
            virtio_type: self.virtio_type,
            common: config_space::COMMON as u32,
            notify: config_space::NOTIFY as u32,
            notify_multiplier: 0,
            isr: config_space::ISR as u32,
            device: config_space::DEVICE as u32,
            msix_table: config_space::MSIX_TABLE as u32,
            msix_vectors: u32::from(self.vectors),
        }
    }

    /// Offset in BAR 0 of an address, where it lies there.
    pub fn decodes(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.config.bar()?)?;
        (offset < BAR_BYTES).then_some(offset)
    }

    /// Reads configuration space.
    pub fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        if let Some(window) = self.config.window(offset) {
            let len = window.len.min(data.len());
            data.fill(0);
            self.bar_read(window.offset, &mut data[..len]);
        } else {
            self.config.read(offset, data);
        }
    }

    /// Writes configuration space.
    pub fn config_write(&mut self, offset: usize, data: &[u8]) {
        if let Some(window) = self.config.window(offset) {
            self.bar_write(window.offset, &data[..window.len.min(data.len())]);
        }
        self.config.write(offset, data);
        self.msix.set_control(self.config.msix());
    }

    /// Reads BAR 0.
    pub fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        let at = (offset % WINDOW_BYTES) as usize;
        match offset - offset % WINDOW_BYTES {
            config_space::COMMON => {
                let failed = self.failed.load(Ordering::Acquire);
                self.registers.read(at, data, failed, self.device_config.generation())
            }
            config_space::ISR => {
                data.fill(0);
                if let (0, Some(byte)) = (at, data.first_mut()) {
                    *byte = self.isr.swap(0, Ordering::AcqRel);
                }
            }
            config_space::DEVICE => self.device_config.read(at, data),
            config_space::MSIX_TABLE => self.msix.read_table(at, data),
            config_space::MSIX_PENDING => self.msix.read_pending(at, data),
            _ => data.fill(0),
        }
    }

    /// Writes BAR 0.
    pub fn bar_write(&mut self, offset: u64, data: &[u8]) {
        let at = (offset % WINDOW_BYTES) as usize;
        match offset - offset % WINDOW_BYTES {
            config_space::COMMON => match self.registers.write(at, data, self.vectors) {
                Change::None => {}
                Change::Reset => self.reset(),
                Change::Start => self.start(),
            },
            // The kernel takes doorbells itself, except where the BAR was moved or not yet known.
            config_space::NOTIFY => {
                let _ = self.doorbell.write(1);
            }
            config_space::DEVICE => self.device_config.write(at, data),
            config_space::MSIX_TABLE => self.msix.write_table(at, data),
            _ => {}
        }
    }

    /// Changes the rate limits, in the order of [`Device::rates`], and wakes whoever waits for them.
    pub fn set_rates(&self, limits: &[RateLimits]) {
        for (rate, limits) in self.rates.iter().zip(limits) {
            rate.set(*limits);
        }
        let _ = self.doorbell.write(1);
    }

    /// Tells the driver that the host changed the device's configuration.
    pub fn announce_config(&self) {
        const ISR_CONFIG: u8 = 2;
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.msix.signal(self.registers.config_vector());
    }

    fn reset(&mut self) {
        self.activation = match std::mem::replace(&mut self.activation, Activation::Broken) {
            Activation::Active(worker) => {
                worker.orders.stop();
                match worker.thread.join() {
                    Ok(Some(backend)) => Activation::Idle(backend),
                    _ => Activation::Broken,
                }
            }
            other => other,
        };
        self.registers.reset();
        self.isr.store(0, Ordering::Release);
        self.failed.store(matches!(self.activation, Activation::Broken), Ordering::Release);
    }

    fn start(&mut self) {
        let started = self
            .queues()
            .zip(self.place_doorbell())
            .and_then(|(queues, ())| self.start_thread(queues));
        if started.is_none() {
            self.failed.store(true, Ordering::Release);
            self.msix.signal(self.registers.config_vector());
        }
    }

    /// The queues as the driver set them up, and such as give nothing where it left out one that
    /// it may; `None` where one is missing or outside of memory.
    fn queues(&self) -> Option<Vec<Queue>> {
        let event_idx = self.registers.accepted() & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        self.registers
            .queues()
            .iter()
            .enumerate()
            .map(|(index, setup)| {
                let mut queue = Queue::new(setup.size_max).ok()?;
                if !setup.enabled && index >= self.queues_needed {
                    return Some(queue);
                }
                let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
                queue.set_size(setup.size);
                let (low, high) = halves(setup.descriptors);
                queue.set_desc_table_address(low, high);
                let (low, high) = halves(setup.available);
                queue.set_avail_ring_address(low, high);
                let (low, high) = halves(setup.used);
                queue.set_used_ring_address(low, high);
                queue.set_event_idx(event_idx);
                queue.set_ready(setup.enabled);
                let placed = queue.desc_table() == setup.descriptors
                    && queue.avail_ring() == setup.available
                    && queue.used_ring() == setup.used;
                (placed && queue.is_valid(&self.ram)).then_some(queue)
            })
            .collect()
    }

    /// Has the kernel turn writes to the notification area into doorbell events. It is never taken
    /// back (that costs milliseconds) except where a guest moved the BAR.
    fn place_doorbell(&mut self) -> Option<()> {
        let address = self.config.bar()? + config_space::NOTIFY;
        if self.doorbell_at != Some(address) {
            if let Some(old) = self.doorbell_at.take() {
                let _ = self.interrupts.unregister_doorbell(&self.doorbell, old);
            }
            self.interrupts.register_doorbell(&self.doorbell, address).ok()?;
            self.doorbell_at = Some(address);
        }
        Some(())
    }

    fn start_thread(&mut self, queues: Vec<Queue>) -> Option<()> {
        let orders = Arc::new(Orders::new().ok()?);
        let vectors = self.registers.queues().iter().map(|queue| queue.vector).collect();
        let work = Work {
            ram: self.ram.clone(),
            queues,
            doorbell: self.doorbell.try_clone().ok()?,
            orders: Arc::clone(&orders),
            interrupt: QueueInterrupt {
                msix: Arc::clone(&self.msix),
                isr: Arc::clone(&self.isr),
                vectors,
            },
            features: self.registers.accepted(),
            counters: Arc::clone(&self.counters),
        };
        let Activation::Idle(mut backend) =
            std::mem::replace(&mut self.activation, Activation::Broken)
        else {
            return None;
        };
        let retired = Arc::new(AtomicBool::new(false));
        let (failed, msix, is_retired) =
            (Arc::clone(&self.failed), Arc::clone(&self.msix), Arc::clone(&retired));
        let config_vector = self.registers.config_vector();
        let role = Role::Device(self.kind);
        let own = Arc::clone(&orders);
        let body = move || {
            if seccomp::narrow(role).is_err() || backend.run(work).is_err() {
                failed.store(true, Ordering::Release);
                msix.signal(config_vector);
            }
            own.end();
            (!is_retired.load(Ordering::Acquire)).then_some(backend)
        };
        let thread = std::thread::Builder::new().name(role.thread_name().into());
        let thread = thread.stack_size(STACK_BYTES).spawn(body).ok()?;
        self.activation = Activation::Active(Worker { orders, retired, thread });
        Some(())
    }

    /// The orders of its thread, where it has one.
    pub fn orders(&self) -> Option<&Arc<Orders>> {
        match &self.activation {
            Activation::Active(worker) => Some(&worker.orders),
            Activation::Idle(_) | Activation::Broken => None,
        }
    }

    /// Takes the device away: its thread stops by itself and closes what it holds.
    pub fn retire(mut self) -> Retired {
        if let Some(address) = self.doorbell_at.take() {
            let _ = self.interrupts.unregister_doorbell(&self.doorbell, address);
        }
        match self.activation {
            Activation::Active(worker) => {
                worker.retired.store(true, Ordering::Release);
                worker.orders.stop();
                Retired(Some(worker.thread))
            }
            Activation::Idle(_) | Activation::Broken => Retired(None),
        }
    }
}
