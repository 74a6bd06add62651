# Draws time, memory and the roofline from the files that the benchmark left in `folder`, as PNG and SVG.

load folder.'/machine.gp'
mechanisms = "softmax banded banded_30 banded_5 linear nystrom fmm additive multipole multipole_pooled"
colours = "#000000 #0072b2 #56b4e9 #a6d8f5 #e69f00 #999999 #cc79a7 #009e73 #d55e00 #f0a58f"
name(i) = word(mechanisms, i)
shown(i) = system("echo '".name(i)."' | tr _ ' '")
# The mechanisms that were measured in a direction, as places in the list above.
measured(direction) = system("for m in ".mechanisms."; do i=$((i + 1)); grep -qx \"# $m\" '".folder."/".direction.".dat' && printf '%d ' $i; done; true")
at(k) = int(word(list, k))

set style line 100 lc rgb '#dddddd' lw 1
set grid xtics ytics ls 100
set key outside right center reverse Left samplen 2 spacing 1.1
set border 3
set tics nomirror
set logscale xy
set format x '%.0f'
tokens_axis = "set format x '%.0f'; set xtics (256, '1k' 1024, '4k' 4096, '16k' 16384, '64k' 65536, '256k' 262144, '1M' 1048576)"

do for [format in "png svg"] {
  if (format eq "png") { set terminal pngcairo size 1500,640 font 'sans,12' } else { set terminal svg size 1500,640 font 'sans,12' }

  do for [what in "time memory"] {
    column = what eq "time" ? 2 : 3
    set output folder.'/'.what.'.'.format
    set multiplot layout 1,2 title what eq "time" ? 'Time of one forward pass (float, 8 heads of 64, one thread)' : 'Memory beside inputs and output (float, 8 heads of 64, one thread)' font ',15'
    eval tokens_axis
    set format y what eq "time" ? '%g ms' : '%g MiB'
    set xlabel 'tokens'
    do for [direction in "bidirectional causal"] {
      set title direction
      list = measured(direction)
      plot for [k = 1:words(list)] folder.'/'.direction.'.dat' index name(at(k)) using 1:column \
        with linespoints lw 2 pt 7 ps 0.7 lc rgb word(colours, at(k)) title shown(at(k))
    }
    unset multiplot
  }

  set output folder.'/roofline.'.format
  set multiplot layout 1,2 title sprintf('Roofline, one thread: peak %.0f GFLOP/s, bandwidth %.0f GB/s', peak, bandwidth) font ',15'
  set xtics auto
  set format x '%g'
  set format y '%g'
  set xlabel 'flops a byte that has to move'
  set ylabel 'GFLOP/s'
  set yrange [1:2 * peak]
  set xrange [0.5:*]
  do for [direction in "bidirectional causal"] {
    set title direction
    list = measured(direction)
    plot (x * bandwidth < peak ? x * bandwidth : peak) with lines lw 2 dt 2 lc rgb '#666666' title 'what the machine allows', \
      for [k = 1:words(list)] folder.'/'.direction.'.dat' index name(at(k)) using 4:5 \
        with linespoints lw 1 pt 7 ps 0.8 lc rgb word(colours, at(k)) title shown(at(k))
  }
  unset multiplot
  set yrange [*:*]
  set xrange [*:*]
  unset ylabel
}
