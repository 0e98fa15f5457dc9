//! One guest in this process, from its configuration to its end. Start reading here.
//!
//! The steps, in order: machine (memory, interrupt chip, vCPUs) → devices → sandbox → control
//! thread → system call filter → image → boot parameters → report → run. Nothing that a tenant wrote is read before
//! the sandbox is closed. The calling thread becomes vCPU 0.

use super::ending::{Cause, Ending, Speak};
use super::resources::Resources;
use super::sandbox::{self, Sandbox, SandboxError};
use super::seccomp::Role;
use super::timings::Clock;
use crate::config::VmConfig;
use crate::control::{self, SpawnReply, Writes};
use crate::machine::board::{Board, HOTPLUG_PIN, PortWrite};
use crate::machine::boot::unikernel::{self, Parameters};
use crate::machine::boot::{self, Loaded, Source};
use crate::machine::memory::Ram;
use crate::machine::run::Gate;
use crate::machine::vcpu::{self, End, Exits};
use crate::machine::{Host, Interrupts, Machine, MachineError, acpi, cpuid};
use crate::pci::{Bus, PlugError};
use abi::boot::{DeviceEntry, MARK_MAIN, MARK_NETWORK, PORT_BOOT_TIMER, PORT_CONSOLE, PORT_EXIT};
use abi::lease::LeaseView;
use kvm_ioctls::VcpuFd;
use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

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

/// Stack of a vCPU's thread.
const VCPU_STACK_BYTES: usize = 256 << 10;

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
    Standalone {
        /// How long the start took is said there at the end.
        boot_timer: bool,
    },
    /// It was reported: what the report needed is closed.
    Made,
}

/// What the threads of a guest share.
pub struct Guest {
    /// Its id.
    pub id: String,
    /// Its boot nonce.
    pub nonce: String,
    /// Its memory, MiB.
    pub memory_mib: u32,
    /// Its devices.
    pub bus: Bus,
    /// Holds its vCPUs while paused.
    pub gate: Gate,
    /// Held by whoever pauses or resumes it.
    pub pausing: Mutex<()>,
    /// When what happened.
    pub clock: Clock,
    /// The host's lease on changing disks, where there is one.
    pub lease: Option<Arc<LeaseView>>,
    ram: Ram,
    board: Board,
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
    let mut machine = Machine::create(&host, config.memory_mib, config.huge_pages, config.vcpus)?;
    let cpu_features = cpuid::features(host.cpuid());
    drop(host);
    let interrupts = Interrupts::new(Arc::clone(&machine.vm));
    let bus = Bus::new(machine.ram.clone(), interrupts.clone());
    let table = resources
        .devices
        .into_iter()
        .map(|device| bus.add_at_boot(device))
        .collect::<Result<Vec<_>, _>>()?;
    vcpu::set_long_mode(&machine.vcpus[0])?;
    let record = resources.exit_record.as_ref().map(AsRawFd::as_raw_fd);
    sandbox.close(&config.sandbox, record, &config.nonce)?;
    let gate = Gate::new(machine.vcpus.len());
    // It closes itself to its own calls before it takes a connection, and waits for the guest.
    let control =
        resources.control.map(control::server::start).transpose().map_err(StartError::Thread)?;
    sandbox::narrow(Role::Vcpu)?;

    let source = Source {
        kernel: &resources.kernel,
        initrd: resources.initrd.as_ref(),
        cmdline: &config.boot.cmdline,
    };
    let loaded = load(&machine, config, &source, &table, cpu_features)?;
    drop((resources.kernel, resources.initrd));
    let board = match loaded {
        Loaded::Unikernel(_) => Board::unikernel(resources.console),
        Loaded::Linux64 { .. } | Loaded::Pvh { .. } => Board::pc(resources.console, interrupts),
    };
    if let Board::Pc { ioapic, .. } = &board {
        bus.announce_on(Arc::clone(ioapic), HOTPLUG_PIN);
    }
    let speak = match report {
        Report::Standalone { boot_timer: true } => Speak::BootTimer,
        Report::Standalone { boot_timer: false } => Speak::Failures,
        Report::Reply { .. } | Report::Made => Speak::Nothing,
    };
    let guest = Arc::new(Guest {
        id: config.id.clone(),
        nonce: config.nonce.clone(),
        memory_mib: config.memory_mib,
        bus,
        gate,
        pausing: Mutex::new(()),
        clock,
        lease: resources.lease,
        ram: machine.ram.clone(),
        board,
        ending: Ending::new(resources.exit_record, config.nonce.clone(), speak),
    });
    guest.record_panics();
    if let Some(control) = control {
        control.serve(&guest);
    }
    let mut first = machine.vcpus.remove(0);
    for (vcpu, id) in machine.vcpus.into_iter().zip(1..) {
        start_vcpu(&guest, vcpu, id).map_err(StartError::Thread)?;
    }
    guest.clock.run.reach();
    guest.report(std::mem::replace(report, Report::Made));
    let end = vcpu::run(&mut first, 0, &guest.gate, guest.as_ref());
    guest.end(Cause::Guest(end))
}

/// Starts the thread of a further vCPU, which waits in the kernel until the first one wakes it.
fn start_vcpu(guest: &Arc<Guest>, mut vcpu: VcpuFd, id: usize) -> std::io::Result<()> {
    let guest = Arc::clone(guest);
    let body = move || {
        let end = vcpu::run(&mut vcpu, id, &guest.gate, guest.as_ref());
        guest.end(Cause::Guest(end))
    };
    std::thread::Builder::new()
        .name(format!("vcpu{id}"))
        .stack_size(VCPU_STACK_BYTES)
        .spawn(body)
        .map(drop)
}

/// Puts the kernel and what it is told into memory, and the first vCPU at its entry.
fn load(
    machine: &Machine,
    config: &VmConfig,
    source: &Source<'_>,
    devices: &[DeviceEntry],
    cpu_features: u64,
) -> Result<Loaded, StartError> {
    let loaded = boot::load(&machine.ram, config.memory_mib, source)?;
    match loaded {
        Loaded::Unikernel(_) if config.vcpus != 1 => return Err(StartError::Vcpus(config.vcpus)),
        Loaded::Unikernel(image) => {
            let parameters = Parameters {
                memory_mib: config.memory_mib,
                image,
                cmdline: source.cmdline,
                devices,
                tsc_hz: machine.tsc_hz,
                cpu_features,
            };
            unikernel::write_parameters(&machine.ram, &parameters)?;
        }
        Loaded::Linux64 { .. } | Loaded::Pvh { .. } => {
            acpi::write(&machine.ram, config.vcpus, boot::random()?)?;
            for vcpu in &machine.vcpus {
                vcpu::set_firmware_state(vcpu)?;
            }
        }
    }
    vcpu::set_entry(&machine.vcpus[0], &loaded)?;
    Ok(loaded)
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
        self.spoke(self.board.drain_console(&self.ram));
    }

    fn spoke(&self, bytes: usize) {
        if bytes > 0 {
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
            _ => match self.board.port_write(port, value) {
                PortWrite::Taken { spoken } => self.spoke(spoken),
                PortWrite::End(end) => return Some(end),
                PortWrite::NotMine => self.bus.port_write(port, data),
            },
        }
        None
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        if !self.board.port_read(port, data) {
            self.bus.port_read(port, data);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        if !self.board.mmio_write(address, data) {
            self.bus.write(address, data);
        }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if !self.board.mmio_read(address, data) {
            self.bus.read(address, data);
        }
    }

    fn exited(&self) {
        self.clock.exited();
    }
}
