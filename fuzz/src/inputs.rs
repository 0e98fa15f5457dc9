//! Inputs of a seed: each depends on its number alone.

/// Most bytes of a random input.
const RANDOM_BYTES_MAX: u64 = 1024;
/// Numbers at which things break.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFF_FFFF,
    0xFFFF_FFFF,
    1 << 32,
    i64::MAX as u64,
    u64::MAX,
];

/// The inputs of a seed.
pub(crate) struct Inputs<'a> {
    seed: u64,
    samples: &'a [Vec<u8>],
}

impl<'a> Inputs<'a> {
    pub(crate) fn new(seed: u64, samples: &'a [Vec<u8>]) -> Inputs<'a> {
        Inputs { seed, samples }
    }

    /// The input of a number: a sample first, then half of them damaged samples, half random.
    pub(crate) fn make(&self, number: u64) -> Vec<u8> {
        let mut random = Random::new(self.seed, number);
        if let Some(sample) = usize::try_from(number).ok().and_then(|at| self.samples.get(at)) {
            return sample.clone();
        }
        if self.samples.is_empty() || random.below(2) == 0 {
            return random_bytes(&mut random);
        }
        let mut bytes = self.samples[random.below(self.samples.len() as u64) as usize].clone();
        for _ in 0..1 + random.below(4) {
            damage(&mut bytes, self.samples, &mut random);
        }
        bytes
    }
}

/// Bytes of a random length; some inputs have few different values, as real ones do.
fn random_bytes(random: &mut Random) -> Vec<u8> {
    let len = random.below(RANDOM_BYTES_MAX) >> random.below(6);
    let mask = [0xFF, 0xFF, 0x0F, 0x03][random.below(4) as usize];
    (0..len).map(|_| random.next() as u8 & mask).collect()
}

fn damage(bytes: &mut Vec<u8>, samples: &[Vec<u8>], random: &mut Random) {
    let at = random.below(bytes.len() as u64 + 1) as usize;
    match random.below(7) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, random.next() as u8),
        2 => {
            let other = &samples[random.below(samples.len() as u64) as usize];
            let from = random.below(other.len() as u64 + 1) as usize;
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
        3 => {
            let edge = EDGES[random.below(EDGES.len() as u64) as usize].to_le_bytes();
            let width = 1 << random.below(4);
            for (byte, value) in bytes.iter_mut().skip(at).zip(&edge[..width]) {
                *byte = *value;
            }
        }
        4 => {
            let until = (at + random.below(16) as usize).min(bytes.len());
            bytes.drain(at..until);
        }
        _ => {
            if let Some(byte) = bytes.get_mut(at) {
                let bit = 1 << random.below(8);
                *byte = if random.below(2) == 0 { random.next() as u8 } else { *byte ^ bit };
            }
        }
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn new(seed: u64, number: u64) -> Random {
        let mut random = Random(seed.wrapping_mul(0xD134_2543_DE82_EF95) ^ number);
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 8) % end.max(1)
    }
}
