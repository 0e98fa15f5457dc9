//! One guest in this process, from its configuration to its end. Start reading here.
//!
//! The steps, in order: machine (memory, interrupt chip, vCPUs) → devices → sandbox → image →
//! boot parameters → control socket → report → run. Nothing that a tenant wrote is read before
//! the sandbox is closed. The calling thread becomes vCPU 0.

use super::ending::{Cause, Ending};
use super::resources::Resources;
use super::sandbox::{Sandbox, SandboxError};
use super::timings::Clock;
use crate::config::VmConfig;
use crate::control::{self, SpawnReply, Writes};
use crate::devices::console::Console;
use crate::machine::boot::{self, Parameters};
use crate::machine::memory::Ram;
use crate::machine::run::Gate;
use crate::machine::vcpu::{self, End, Exits};
use crate::machine::{Host, Interrupts, Machine, MachineError};
use crate::pci::{Bus, PlugError};
use abi::boot::{DeviceEntry, MARK_MAIN, MARK_NETWORK, PORT_BOOT_TIMER, PORT_CONSOLE, PORT_EXIT};
use abi::lease::LeaseView;
use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

/// Why a guest could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The machine could not be made.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A device could not be plugged.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// The process could not be closed.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A thread could not be started.
    #[error("start a thread: {0}")]
    Thread(#[source] std::io::Error),
    /// More vCPUs than this boot protocol starts.
    #[error("vcpus: {0}; a unikernel has 1")]
    Vcpus(u8),
}

/// To whom the start is reported.
pub enum Report {
    /// To the one who asked the spawner, with this process's pidfd.
    Reply {
        /// The socket for the answer.
        socket: OwnedFd,
        /// This process.
        pidfd: Option<OwnedFd>,
    },
    /// To nobody; a crash is said on standard error.
    Standalone,
    /// It was reported: what the report needed is closed.
    Made,
}

/// What the threads of a guest share.
pub struct Guest {
    /// Its id.
    pub id: String,
    /// Its boot nonce.
    pub nonce: String,
    /// Its devices.
    pub bus: Bus,
    /// Holds its vCPUs while paused.
    pub gate: Gate,
    /// When what happened.
    pub clock: Clock,
    /// The host's lease on changing disks, where there is one.
    pub lease: Option<Arc<LeaseView>>,
    ram: Ram,
    console: Mutex<Console>,
    ending: Ending,
}

/// Starts the guest and stays until it ends; returns only where it could not start, with `report`
/// as it was.
pub fn run(
    host: Host,
    config: &VmConfig,
    resources: Resources,
    clock: Clock,
    sandbox: Sandbox,
    report: &mut Report,
) -> Result<Infallible, StartError> {
    if config.vcpus != 1 {
        return Err(StartError::Vcpus(config.vcpus));
    }
    let mut machine = Machine::create(&host, config.memory_mib, config.vcpus)?;
    let cpu_features = vcpu::features(host.cpuid());
    drop(host);
    let bus = Bus::new(machine.ram.clone(), Interrupts::new(Arc::clone(&machine.vm)));
    let table = resources
        .devices
        .into_iter()
        .map(|device| bus.add_at_boot(device))
        .collect::<Result<Vec<_>, _>>()?;
    vcpu::set_long_mode(&machine.vcpus[0])?;
    let record = resources.exit_record.as_ref().map(AsRawFd::as_raw_fd);
    sandbox.close(&config.sandbox, record, &config.nonce)?;

    load(&machine, config, &resources.kernel, &table, cpu_features)?;
    drop(resources.kernel);
    let speak = matches!(report, Report::Standalone);
    let guest = Arc::new(Guest {
        id: config.id.clone(),
        nonce: config.nonce.clone(),
        bus,
        gate: Gate::new(machine.vcpus.len()),
        clock,
        lease: resources.lease,
        ram: machine.ram.clone(),
        console: Mutex::new(Console::new(resources.console)),
        ending: Ending::new(resources.exit_record, config.nonce.clone(), speak),
    });
    guest.record_panics();
    if let Some(listener) = resources.control {
        control::server::start(listener, Arc::clone(&guest)).map_err(StartError::Thread)?;
    }
    let mut first = machine.vcpus.remove(0);
    guest.clock.run.reach();
    guest.report(std::mem::replace(report, Report::Made));
    let end = vcpu::run(&mut first, 0, &guest.gate, guest.as_ref());
    guest.end(Cause::Guest(end))
}

/// Puts image, page tables and parameters into memory, and the vCPU at the image's entry.
fn load(
    machine: &Machine,
    config: &VmConfig,
    kernel: &std::fs::File,
    devices: &[DeviceEntry],
    cpu_features: u64,
) -> Result<(), MachineError> {
    let first = &machine.vcpus[0];
    let image = boot::load(&machine.ram, kernel)?;
    boot::write_page_tables(&machine.ram, config.memory_mib)?;
    let parameters = Parameters {
        memory_mib: config.memory_mib,
        image,
        cmdline: &config.boot.cmdline,
        devices,
        tsc_hz: machine.tsc_hz,
        cpu_features,
    };
    boot::write_parameters(&machine.ram, &parameters)?;
    vcpu::set_entry(first, image.entry)
}

impl Guest {
    /// Takes what is left of the console, writes the exit record, and ends the process.
    pub fn end(&self, cause: Cause) -> ! {
        self.drain_console();
        self.ending.end(cause, self.clock.timings())
    }

    /// Whether the lease lets it change its disks now.
    pub fn writes(&self) -> Writes {
        match &self.lease {
            Some(lease) if !lease.allows_writes() => Writes::Waiting,
            _ => Writes::Allowed,
        }
    }

    fn drain_console(&self) {
        let taken = self.console.lock().unwrap_or_else(PoisonError::into_inner).drain(&self.ram);
        if taken > 0 {
            self.clock.console.reach();
        }
    }

    /// A panic is a defect of ours: the guest ends, and its record says where.
    fn record_panics(self: &Arc<Guest>) {
        let guest = Arc::clone(self);
        std::panic::set_hook(Box::new(move |panic| {
            guest.ending.end(
                Cause::Guest(End::Error(format!("defect in the VMM: {panic}"))),
                guest.clock.timings(),
            )
        }));
    }

    fn report(&self, report: Report) {
        let Report::Reply { socket, pidfd } = report else { return };
        let reply = SpawnReply::Spawned { pid: std::process::id(), timings: self.clock.timings() };
        // Whoever asked may have gone; the guest runs all the same.
        if let Ok(message) = serde_json::to_vec(&reply) {
            let pidfd: Vec<_> = pidfd.iter().map(AsFd::as_fd).collect();
            let _ = abi::control::send(&socket, &message, &pidfd);
        }
    }
}

impl Exits for Guest {
    fn port_write(&self, port: u16, data: &[u8]) -> Option<End> {
        let value = data.first().copied().unwrap_or(0);
        match port {
            PORT_BOOT_TIMER if value == MARK_MAIN => self.clock.main.reach(),
            PORT_BOOT_TIMER if value == MARK_NETWORK => self.clock.network.reach(),
            PORT_CONSOLE => self.drain_console(),
            PORT_EXIT => return Some(End::PowerOff(value)),
            _ => {}
        }
        None
    }

    fn port_read(&self, _port: u16, _data: &mut [u8]) {}

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.bus.write(address, data);
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.bus.read(address, data);
    }

    fn exited(&self) {
        self.clock.first_exit.reach();
    }
}
