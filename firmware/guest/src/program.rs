//! Runs the steps that the user data lists.

use crate::http_server::{HttpServer, SERVERS_MAX};
use crate::world::World;
use crate::{http_client, ping};
use alloc::string::{String, ToString};
use inputs::http::Url;
use inputs::steps::{self, DiskLoad, Pattern, Step};
use runtime::clock::{self, Instant};
use runtime::{cpu, println};

/// A disk that is not there yet is looked for again after this, beside every hot-plug event.
const LOOK_AGAIN_MICROS: u64 = 1_000_000;

/// Runs user data, prints a line for each step and one at the end.
pub(crate) fn run(world: &mut World, user_data: &[u8]) {
    if user_data.is_empty() {
        return;
    }
    if !steps::is_step_list(user_data) {
        println!("trine: user_data ignored (no {} line)", steps::FIRST_LINE);
        return;
    }
    let steps = match steps::parse(&String::from_utf8_lossy(user_data)) {
        Ok(steps) => steps,
        Err(error) => return fail(error.number, &error.name, &error.reason),
    };
    for (n, step) in steps.iter().enumerate() {
        let (number, name) = (n + 1, step.name());
        match run_step(world, step) {
            Ok(detail) if detail.is_empty() => println!("trine: step {number} {name} ok"),
            Ok(detail) => println!("trine: step {number} {name} ok {detail}"),
            Err(reason) => return fail(number, name, &reason),
        }
        if *step == Step::PowerOff {
            println!("trine: steps done");
            cpu::exit(0);
        }
    }
    println!("trine: steps done");
}

fn fail(number: usize, name: &str, reason: &str) {
    println!("trine: step {number} {name} failed {reason}");
    println!("trine: steps failed at {number}");
}

/// The detail of a step that went well, or the reason why not.
fn run_step(world: &mut World, step: &Step) -> Result<String, String> {
    match step {
        Step::Print(text) => Ok(text.clone()),
        Step::Sleep { micros } => {
            world.wait_until(clock::now().after_micros(*micros));
            Ok(String::new())
        }
        Step::Ping { address, count, timeout_micros } => {
            ping::ping(world, *address, *count, deadline(*timeout_micros))
        }
        Step::HttpServe { port, text } => http_serve(world, *port, text),
        Step::HttpGet { url, expect, timeout_micros } => {
            http_get(world, url, expect.as_deref(), *timeout_micros)
        }
        Step::DiskWait { serial, timeout_micros } => disk_wait(world, serial, *timeout_micros),
        Step::DiskWrite(pattern) => disk_write(world, pattern),
        Step::DiskVerify(pattern) => disk_verify(world, pattern),
        Step::DiskLoad(load) => disk_load(world, load),
        Step::DiskGone { serial, timeout_micros } => disk_gone(world, serial, *timeout_micros),
        Step::PowerOff => Ok(String::new()),
    }
}

fn deadline(timeout_micros: u64) -> Instant {
    clock::now().after_micros(timeout_micros)
}

fn millis_since(start: Instant) -> u64 {
    clock::now().micros_since(start) / 1000
}

fn http_serve(world: &mut World, port: u16, text: &str) -> Result<String, String> {
    let network = world.network.as_mut().ok_or("no network device")?;
    if network.servers.len() == SERVERS_MAX {
        return Err(alloc::format!("at most {SERVERS_MAX} ports are served"));
    }
    if network.servers.iter().any(|server| server.port() == port) {
        return Err(alloc::format!("port {port} is served already"));
    }
    let server = HttpServer::listen(&mut network.sockets, port, text.to_string());
    network.servers.push(server);
    Ok(alloc::format!("port {port}"))
}

fn http_get(
    world: &mut World,
    url: &Url,
    expect: Option<&str>,
    timeout_micros: u64,
) -> Result<String, String> {
    let start = clock::now();
    http_client::get(world, url, deadline(timeout_micros), |response| {
        let contains = |text: &str| String::from_utf8_lossy(&response.body).contains(text);
        match expect {
            _ if response.status != 200 => Err(alloc::format!("status {}", response.status)),
            Some(text) if !contains(text) => {
                Err(alloc::format!("the body does not contain {text}"))
            }
            _ => Ok(alloc::format!("{} bytes, {} ms", response.body.len(), millis_since(start))),
        }
    })
}

fn disk_wait(world: &mut World, serial: &str, timeout_micros: u64) -> Result<String, String> {
    let deadline = deadline(timeout_micros);
    loop {
        if let Some(slot) = world.find_disk(serial)
            && let Ok(disk) = world.disk(slot)
        {
            return Ok(alloc::format!("{} bytes", disk.size_bytes()));
        }
        if !look_again(world, deadline) {
            return Err(alloc::format!("no disk {serial} in time"));
        }
    }
}

fn disk_gone(world: &mut World, serial: &str, timeout_micros: u64) -> Result<String, String> {
    let deadline = deadline(timeout_micros);
    while world.find_disk(serial).is_some() {
        if !look_again(world, deadline) {
            return Err(alloc::format!("disk {serial} is still there"));
        }
    }
    Ok(String::new())
}

/// Waits for an event; `false` where time is up.
fn look_again(world: &mut World, deadline: Instant) -> bool {
    let now = clock::now();
    if now >= deadline {
        return false;
    }
    world.turn(Some(deadline.min(now.after_micros(LOOK_AGAIN_MICROS))));
    true
}

/// Serves nothing else meanwhile, so that nothing else is in the figures.
fn disk_load(world: &mut World, load: &DiskLoad) -> Result<String, String> {
    let slot =
        world.find_disk(&load.serial).ok_or_else(|| alloc::format!("no disk {}", load.serial))?;
    let figures = world.load(slot, load).map_err(|error| error.to_string())?;
    Ok(alloc::format!("{} operations in {} ns", figures.operations, figures.nanos))
}

fn find(world: &mut World, pattern: &Pattern) -> Result<u16, String> {
    let slot = world
        .find_disk(&pattern.serial)
        .ok_or_else(|| alloc::format!("no disk {}", pattern.serial))?;
    let size_bytes = world.disk(slot).map_err(|error| error.to_string())?.size_bytes();
    if pattern.bytes > size_bytes {
        return Err(alloc::format!("{} bytes don't fit on a disk of {size_bytes}", pattern.bytes));
    }
    Ok(slot)
}

fn disk_write(world: &mut World, pattern: &Pattern) -> Result<String, String> {
    let slot = find(world, pattern)?;
    let start = clock::now();
    world.write_pattern(slot, pattern).map_err(|error| error.to_string())?;
    let millis = millis_since(start);
    world.verify_pattern(slot, pattern).map_err(|error| error.to_string())?;
    Ok(alloc::format!("{} bytes written in {millis} ms and read back", pattern.bytes))
}

fn disk_verify(world: &mut World, pattern: &Pattern) -> Result<String, String> {
    let slot = find(world, pattern)?;
    world.verify_pattern(slot, pattern).map_err(|error| error.to_string())?;
    Ok(alloc::format!("{} bytes", pattern.bytes))
}
