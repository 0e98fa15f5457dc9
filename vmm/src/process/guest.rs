//! One guest in this process, from its configuration to its end. Start reading here.
//!
//! The steps, in order: machine (memory, interrupt chip, vCPUs) → devices → image → boot
//! parameters → run. The calling thread becomes vCPU 0.

use super::ending::{Cause, Ending};
use super::resources::Resources;
use super::timings::Clock;
use crate::config::VmConfig;
use crate::devices::console::Console;
use crate::machine::boot::{self, Parameters};
use crate::machine::memory::Ram;
use crate::machine::run::Gate;
use crate::machine::vcpu::{self, End, Exits};
use crate::machine::{Host, Interrupts, Machine, MachineError};
use crate::pci::{Bus, PlugError};
use abi::boot::{MARK_MAIN, MARK_NETWORK, PORT_BOOT_TIMER, PORT_CONSOLE, PORT_EXIT};
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
}

/// What the threads of a guest share.
pub struct Guest {
    ram: Ram,
    bus: Bus,
    console: Mutex<Console>,
    clock: Clock,
    gate: Gate,
    ending: Ending,
}

/// Starts the guest and stays until it ends; returns only where it could not start.
pub fn run(host: &Host, config: &VmConfig, resources: Resources, clock: Clock, speak: bool) -> Result<(), StartError> {
    let mut machine = Machine::create(host, config.memory_mib, config.vcpus)?;
    let bus = Bus::new(machine.ram.clone(), Interrupts::new(Arc::clone(&machine.vm)));
    let table = resources.devices.into_iter().map(|device| bus.add_at_boot(device)).collect::<Result<Vec<_>, _>>()?;
    let image = boot::load(&machine.ram, &resources.kernel)?;
    boot::write_page_tables(&machine.ram, config.memory_mib)?;
    let first = &machine.vcpus[0];
    vcpu::set_long_mode(first)?;
    vcpu::set_entry(first, image.entry)?;
    boot::write_parameters(
        &machine.ram,
        &Parameters {
            memory_mib: config.memory_mib,
            image,
            cmdline: &config.boot.cmdline,
            devices: &table,
            tsc_hz: vcpu::tsc_hz(first)?,
            cpu_features: vcpu::features(host.cpuid()),
        },
    )?;
    let guest = Arc::new(Guest {
        ram: machine.ram.clone(),
        bus,
        console: Mutex::new(Console::new(resources.console)),
        clock,
        gate: Gate::new(machine.vcpus.len()),
        ending: Ending::new(resources.exit_record, config.nonce.clone(), speak),
    });
    guest.clock.run.reach();
    let mut first = machine.vcpus.remove(0);
    let end = vcpu::run(&mut first, 0, &guest.gate, guest.as_ref());
    guest.end(Cause::Guest(end))
}

impl Guest {
    fn end(&self, cause: Cause) -> ! {
        self.drain_console();
        self.ending.end(cause, self.clock.timings())
    }

    fn drain_console(&self) {
        let taken = self.console.lock().unwrap_or_else(PoisonError::into_inner).drain(&self.ram);
        if taken > 0 {
            self.clock.console.reach();
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
