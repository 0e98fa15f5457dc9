//! What Linux's own drivers make of the devices, and what programs on the host find at the other
//! end of them.

use super::BZIMAGE;
use super::guest::{DEADLINE, Guest, Outcome, expect, text};
use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};
use vmm::control::{BalloonStatus, Client};

/// Bytes that go there and back.
const ECHO_BYTES: usize = 1 << 20;
const MIB: u64 = 1 << 20;

pub(crate) fn network_is_a_tap_of_the_hosts(guest: &mut Guest) -> Outcome {
    let mac = "fa:16:3e:00:00:07";
    let net = json!({"id": "eth0", "mac": mac, "mtu": 1400, "backend": {"tap": {"path": "tap0"}}});
    guest.start(BZIMAGE, "net", json!({"memory_mib": 128, "vcpus": 2, "nets": [net]}))?;
    guest.wait_for(&format!("guest: eth0 {mac} 1400"))?;
    host(&["ip", "address", "add", "10.77.0.1/24", "dev", "tap0"])?;
    host(&["ip", "link", "set", "tap0", "up"])?;
    guest.wait_for("guest: serving")?;
    let server = retry(|| TcpStream::connect("10.77.0.2:7"))?;
    let answer = server.try_clone().map_err(text)?;
    echo(server, answer, |server| server.shutdown(Shutdown::Write))?;
    guest.wait_for("guest: served")?;
    guest.ends_with("power_off", Some(0))
}

pub(crate) fn streams_cross_between_host_and_guest(guest: &mut Guest) -> Outcome {
    let path = guest.directory.join("vsock");
    let listener = UnixListener::bind(guest.directory.join("vsock_52")).map_err(text)?;
    let vsock = json!({"cid": 42, "socket": {"path": path}});
    guest.start(BZIMAGE, "vsock", json!({"memory_mib": 128, "vcpus": 2, "vsock": vsock}))?;
    guest.wait_for("guest: listening as 42")?;
    // The host asks the guest.
    let mut stream = UnixStream::connect(&path).map_err(text)?;
    stream.write_all(b"CONNECT 1024\n").map_err(text)?;
    let mut answer = BufReader::new(stream.try_clone().map_err(text)?);
    let mut line = String::new();
    answer.read_line(&mut line).map_err(text)?;
    if !line.starts_with("OK ") {
        return Err(format!("the guest's answer is {line:?}"));
    }
    echo(stream, answer, |stream| stream.shutdown(Shutdown::Write))?;
    guest.wait_for("guest: echoed 1048576")?;
    // The guest asks the host.
    let (mut asked, _) = listener.accept().map_err(text)?;
    let mut copy = asked.try_clone().map_err(text)?;
    let copied = std::io::copy(&mut copy, &mut asked).map_err(text)?;
    expect("bytes of the guest", &copied, &(ECHO_BYTES as u64))?;
    drop((asked, copy));
    guest.wait_for("guest: asked 1048576")?;
    guest.wait_for("guest: nobody at 53")?;
    guest.ends_with("power_off", Some(0))?;
    expect("its socket", &path.exists(), &false)
}

pub(crate) fn random_numbers_come_from_the_host(guest: &mut Guest) -> Outcome {
    guest.start(BZIMAGE, "rng", json!({"memory_mib": 128, "rng": {}}))?;
    guest.wait_for("guest: rng virtio_rng.0")?;
    guest.wait_for("guest: random 65536 differ")?;
    guest.ends_with("power_off", Some(0))
}

/// Fills memory in the guest, and frees it; returns what was resident while it was full.
fn fill_and_free(guest: &mut Guest) -> Result<(Client, u32, u64), String> {
    guest.wait_for("guest: filled 1 right")?;
    let client = guest.client()?;
    let pid = client.status().map_err(text)?.pid;
    let full = resident(pid)?;
    if full < 110 * MIB {
        return Err(format!("{full} bytes are resident of a guest that filled 80 MiB"));
    }
    // Its signal to go on.
    client.set_balloon(60).map_err(text)?;
    guest.wait_for("guest: freed")?;
    Ok((client, pid, full))
}

pub(crate) fn balloon_takes_memory_and_gives_it_back(guest: &mut Guest) -> Outcome {
    let balloon = json!({"free_page_reporting": false});
    guest.start(BZIMAGE, "balloon", json!({"memory_mib": 256, "balloon": balloon}))?;
    let (client, pid, full) = fill_and_free(guest)?;
    let free = figures(&client)?.statistics.and_then(|all| all.free_bytes).unwrap_or(0);
    client.set_balloon(170).map_err(text)?;
    until("the balloon is in", || Ok(figures(&client)?.size_mib == 170))?;
    // What is left to the guest, and the VMM itself.
    let (left, most) = (resident(pid)?, (256 - 170 + 8) * MIB);
    if left > most {
        return Err(format!("{full} bytes were resident, {left} are; with the balloon {most}"));
    }
    let after = figures(&client)?;
    let less = after.statistics.and_then(|all| all.free_bytes).unwrap_or(u64::MAX);
    if less + 90 * MIB > free || after.given_back_bytes < 170 * MIB || after.refusals != 0 {
        return Err(format!("free before: {free}; after: {after:?}"));
    }
    client.set_balloon(0).map_err(text)?;
    until("the balloon is out", || Ok(figures(&client)?.size_mib == 0))?;
    guest.wait_for("guest: filled 2 right")?;
    if client.set_balloon(257).is_ok() {
        return Err("a balloon larger than the guest was not refused".into());
    }
    guest.ends_with("power_off", Some(0))
}

pub(crate) fn free_memory_goes_back_by_itself(guest: &mut Guest) -> Outcome {
    guest.start(BZIMAGE, "balloon", json!({"memory_mib": 256, "balloon": {}}))?;
    let (client, pid, full) = fill_and_free(guest)?;
    // Blocks of 2 MiB that are wholly free are reported, so some of it stays.
    until("what the guest freed is resident no more", || Ok(resident(pid)? + 40 * MIB < full))?;
    client.kill().map_err(text)?;
    guest.ends_with("killed", None)
}

fn figures(client: &Client) -> Result<BalloonStatus, String> {
    client.balloon().map_err(text)
}

/// Bytes of a process that are in memory.
fn resident(pid: u32) -> Result<u64, String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(text)?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().split(' ').next());
    let kib: u64 = kib.and_then(|kib| kib.parse().ok()).ok_or("no VmRSS")?;
    Ok(kib * 1024)
}

fn until(what: &str, mut holds: impl FnMut() -> Result<bool, String>) -> Outcome {
    let end = Instant::now() + DEADLINE;
    while !holds()? {
        if Instant::now() > end {
            return Err(format!("it never happens that {what}"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn retry<T>(mut attempt: impl FnMut() -> std::io::Result<T>) -> Result<T, String> {
    let mut result = None;
    until("the guest answers", || {
        result = attempt().ok();
        Ok(result.is_some())
    })?;
    result.ok_or_else(|| "no answer".into())
}

/// Sends a pattern and reads it back at the same time.
fn echo<W: Write + Send>(
    mut to: W,
    mut from: impl Read,
    finish: impl FnOnce(&W) -> std::io::Result<()> + Send,
) -> Outcome {
    let pattern: Vec<u8> = (0..ECHO_BYTES).map(|at| (at / 7 + at / 1000) as u8).collect();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| to.write_all(&pattern).and_then(|()| finish(&to)));
        let mut back = Vec::new();
        from.read_to_end(&mut back).map_err(text)?;
        sender.join().map_err(|_| "the sender failed".to_string())?.map_err(text)?;
        if back == pattern { Ok(()) } else { Err(format!("{} wrong bytes came back", back.len())) }
    })
}

/// A command of the emulated host.
fn host(arguments: &[&str]) -> Outcome {
    let status = Command::new("/bin/busybox").args(arguments).status().map_err(text)?;
    if status.success() { Ok(()) } else { Err(format!("{arguments:?}: {status}")) }
}
