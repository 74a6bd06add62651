# Draws the learning curves of `runs`, folders that train left, each in double quotes, called `names`, into `picture`: the
# loss in training against the steps, and what validation said against the time on one core.

# Below the two diagrams there is a line for each name: some are long.
lines = 17.0 * words(runs)
height = 430 + lines
set terminal pngcairo size 1100,height font 'sans,11'
set output picture
set datafile separator ','
set datafile missing NaN
set style line 100 lc rgb '#dddddd' lw 1
set grid xtics ytics ls 100
set border 3
set tics nomirror
set multiplot layout 1,2 title group font ',14' margins 0.07,0.98,(lines + 60) / height,(height - 40) / height spacing 0.09,0
unset key
colours = "#000000 #e69f00 #cc79a7 #d55e00 #0072b2 #009e73 #56b4e9 #999999 #f0a58f #a6d8f5"
file(i) = word(runs, i).'/log.csv'
of(part, number) = strcol(2) eq part ? number : NaN
unit = group[1:5] eq 'bytes' ? 'bits per byte' : 'accuracy, percent'

set xlabel 'step'
set ylabel 'training loss'
plot for [i = 1:words(runs)] file(i) using 1:(of('training', $3)) with lines lw 2 lc rgb word(colours, (i - 1) % 10 + 1) notitle

set key at screen 0.05,(lines + 4) / height top left Left reverse samplen 2 font ',9' maxcols 1 noenhanced
set xlabel 'CPU seconds'
set ylabel 'validation: '.unit
plot for [i = 1:words(runs)] file(i) using 6:(of('validation', $4)) with linespoints lw 2 pt 7 ps 0.5 lc rgb word(colours, (i - 1) % 10 + 1) title word(names, i)
unset multiplot
