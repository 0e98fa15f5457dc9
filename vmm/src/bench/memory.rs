//! What a guest's process costs in memory beyond the guest's own.

use std::io;

/// Memory of a guest's process that no other process shares, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// What the guest has touched of its own.
    pub guest_bytes: u64,
    /// All the rest: what the VMM costs.
    pub vmm_bytes: u64,
}

impl Memory {
    /// Of process `pid`, whose guest has `memory_mib`; as root, or where the process may be traced.
    pub fn of(pid: u32, memory_mib: u32) -> io::Result<Memory> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let memory = parse(&maps, u64::from(memory_mib) << 10);
        memory.ok_or_else(|| io::Error::other(format!("no guest memory in process {pid}")))
    }
}

/// Sums the private pages of `/proc/PID/smaps`; the guest's mapping is the one of its size (guests
/// above the PCI hole have a second one, and are not measured).
fn parse(maps: &str, guest_kib: u64) -> Option<Memory> {
    let mut memory = Memory::default();
    let (mut is_guest, mut found) = (false, false);
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (key, value) = (words.next()?, words.next().unwrap_or("0"));
        let kib = || value.parse::<u64>().unwrap_or(0);
        match key {
            // The first line of each mapping.
            "Size:" => {
                is_guest = kib() == guest_kib;
                found |= is_guest;
            }
            "Private_Clean:" | "Private_Dirty:" | "Swap:" => {
                let sum = if is_guest { &mut memory.guest_bytes } else { &mut memory.vmm_bytes };
                *sum += kib() << 10;
            }
            _ => {}
        }
    }
    found.then_some(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
00400000-00500000 r-xp 00000000 fe:00 12 /usr/bin/trine-vmm
Size:               1024 kB
Private_Clean:        12 kB
Private_Dirty:         0 kB
Swap:                  0 kB
7f0000000000-7f0004000000 rw-p 00000000 00:00 0
Size:              65536 kB
Private_Clean:         0 kB
Private_Dirty:      2048 kB
Swap:                  4 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
Size:                132 kB
Private_Clean:         0 kB
Private_Dirty:        36 kB
Swap:                  0 kB
";

    #[test]
    fn the_guests_own_memory_is_told_apart() {
        let expected = Memory { guest_bytes: 2052 << 10, vmm_bytes: 48 << 10 };
        assert_eq!(parse(MAPS, 64 << 10), Some(expected));
        assert_eq!(parse(MAPS, 128 << 10), None);
    }
}
