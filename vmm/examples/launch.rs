//! Launch times of the floor program and of guests, interleaved: `launch TRINE_VMM KVM_FLOOR [N]`.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use vmm::bench::{self, Devices, Image, Sample};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, executable, floor, rest @ ..] = arguments.as_slice() else {
        return Err("launch TRINE_VMM KVM_FLOOR [N]".into());
    };
    let count: usize = rest.first().map_or(Ok(300), |count| count.parse())?;
    let spawner = vmm::spawner::Client::start(Path::new(executable))?;
    println!("sandbox: {}", spawner.sandbox());
    let floor = File::open(floor)?;
    let mut kernel =
        File::from(rustix::fs::memfd_create("probe", rustix::fs::MemfdFlags::CLOEXEC)?);
    kernel.write_all(&vmm::probe::image(false, 0))?;
    let image = Image { kernel: &kernel, cmdline: "", memory_mib: 128 };
    let mut series: [Vec<Sample>; 3] = Default::default();
    for _ in 0..count {
        series[0].push(bench::floor(&spawner, &floor, 128)?);
        series[1].push(bench::launch(&spawner, image, Devices::None)?);
        series[2].push(bench::launch(&spawner, image, Devices::BlockAndNet)?);
    }
    for (name, samples) in ["floor", "cold/no-devices", "cold/devices"].into_iter().zip(&series) {
        let p50 = |value: fn(&Sample) -> u64| {
            let mut values: Vec<u64> = samples.iter().map(value).collect();
            values.sort_unstable();
            values.get(values.len() / 2).copied().unwrap_or(0) / 1000
        };
        println!(
            "{name:16} launch {:5} us (fork {}, built {}), exit {} us, cpu {} us",
            p50(|sample| sample.launch_ns),
            p50(|sample| sample.fork_ns),
            p50(|sample| sample.built_ns),
            p50(|sample| sample.exit_ns),
            p50(|sample| sample.cpu_ns)
        );
    }
    Ok(())
}
