//! The built-in guest: it takes an address by DHCP, reads its instance data from config drive
//! and metadata, runs the steps that its user data lists, and then stays up, serving, halted.
//!
//! It never trusts what it reads (every parser is in `inputs`), never polls while idle, and
//! never does I/O outside [`world::World::turn`]. Start at `guest_main`, then `world`.
#![no_std]
#![no_main]

extern crate alloc;

mod disks;
mod http_client;
mod http_server;
mod instance;
mod network;
mod ping;
mod program;
mod world;

use abi::boot::MARK_MAIN;
use runtime::{boot, clock, cpu, interrupts, println};
use world::World;

/// How long DHCP may take before the guest goes on without a network.
const DHCP_MICROS_MAX: u64 = 10_000_000;

/// The mark comes first, and from a page that the entry stub has touched already.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.entry")]
fn guest_main() -> ! {
    cpu::mark(MARK_MAIN);
    live()
}

#[inline(never)]
fn live() -> ! {
    println!("trine: booted {}", env!("CARGO_PKG_VERSION"));
    if boot::has_word("exit-after-main") {
        cpu::exit(0);
    }
    interrupts::open();
    let mut world = World::default();
    // The network first: the first DHCP message is under way while the disks start.
    world.open_networks(boot::devices());
    world.open_disks(boot::devices());
    let network = wait_for_network(&mut world);
    if boot::has_word("exit-after-network") {
        cpu::exit(u8::from(network.is_err()));
    }
    world.look_for_changes();
    if let Some(user_data) = instance::read(&mut world, network) {
        program::run(&mut world, &user_data);
    }
    loop {
        world.turn(None);
    }
}

/// The address is printed where the lease is taken; this says why there is none.
fn wait_for_network(world: &mut World) -> Result<(), &'static str> {
    if world.network.is_none() {
        println!("trine: no network device");
        return Err("no network device");
    }
    let deadline = clock::now().after_micros(DHCP_MICROS_MAX);
    while clock::now() < deadline {
        if world.network.as_ref().is_some_and(network::Network::has_address) {
            return Ok(());
        }
        world.turn(Some(deadline));
    }
    println!("trine: network failed no answer to DHCP in 10 s");
    Err("no network")
}
